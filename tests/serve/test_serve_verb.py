"""The verb `serve`: what it refuses before anything is loaded, and what it reads."""

import subprocess
import sys

import pytest

from r2r_glimp.core import UsageError
from r2r_glimp.serve.auth import ENV, read_keys
from r2r_glimp.serve.server import open_socket
from tests.cli.conftest import cli  # noqa: F401


def test_help_is_fast_and_light() -> None:
    code = (
        "import sys, r2r_glimp.cli.main as m; m.main(['serve', '--help']);"
        "print({'torch', 'fastapi', 'uvicorn', 'openai'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"
    for option in ("--host", "--port", "--api_key_file", "--max_queue", "--deadline", "--router"):
        assert option in done.stdout


def test_a_second_server_says_so_in_one_line(cli) -> None:  # noqa: F811
    sock = open_socket("127.0.0.1", 0)
    port = sock.getsockname()[1]
    result = cli("serve", "--port", port)
    assert result.code == 2 and f"port {port} is taken, perhaps by another server" in result.error
    sock.close()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--slm", "none", "--llm", "none", "--port", "0"), "none"),
        (("--port", "70000"), "--port 70000 is out of range"),
        (("--port", "-1"), "--port -1 is out of range"),
        (("--host", "no such host"), "is no address"),
        (("--host", "192.0.2.1"), "cannot be listened on"),
        (("--max_queue", "-1"), "--max_queue -1 is out of range"),
        (("--deadline", "0"), "--deadline 0"),
        (("--stall", "nan"), "--stall"),
        (("--max_body", "many"), "many"),
        (("--served_name", "a:b"), "without a colon"),
        (("--n", "2"), "--n is for generate"),
        (("--seed", "1"), "--seed is for generate"),
        (("--router", "slm", "--threshold", "1"), "threshold"),
        (("--api_key_file", "none"), "--api_key_file none: No such file"),
    ],
)
def test_one_line_where_it_cannot_be(cli, tmp_path, monkeypatch, args, message) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    result = cli("serve", *args)
    assert result.code == 2 and message in result.error


def test_keys_fail_closed(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    assert not read_keys(None)
    path = tmp_path / "keys"
    path.write_text("# mine\n secret \n\nother\n")
    keys = read_keys(str(path))
    assert keys and keys.admit(b"Bearer secret") and keys.admit(b"Bearer other")
    assert not keys.admit(b"Bearer # mine") and not keys.admit(b"") and not keys.admit(b"Bearer ")
    for empty in ("", "\n\n", "# none\n"):
        path.write_text(empty)
        with pytest.raises(UsageError, match="empty key, or none"):
            read_keys(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_keys(str(path))
    monkeypatch.setenv(ENV, "a, b")
    assert read_keys(None).admit(b"Bearer b")
    for empty in ("", "a,,b", " "):
        monkeypatch.setenv(ENV, empty)
        with pytest.raises(UsageError, match=ENV):
            read_keys(None)
