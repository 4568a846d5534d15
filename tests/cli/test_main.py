"""The dispatcher: helps, unknown verbs, exit codes, and what is imported when."""

import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from r2r_glimp.cli import main as dispatcher
from r2r_glimp.core import CheckpointError, DataError, EngineError, UsageError

HEAVY = ("torch", "transformers", "lightning", "fastapi", "datasets")


@pytest.fixture
def verb(monkeypatch):
    """A verb `test` that does what the test says."""

    def install(run):
        module = SimpleNamespace(run=run)
        monkeypatch.setitem(sys.modules, "test_verb_module", module)
        monkeypatch.setitem(dispatcher._MODULES, "test", "test_verb_module")

    return install


def raising(error):
    def run(argv):
        raise error

    return run


def test_help_lists_every_verb(cli):
    result = cli("--help")
    assert result.code == 0 and result.err == ""
    for name, _, summary in dispatcher.VERBS:
        assert f"  {name}" in result.out and summary in result.out
    assert "examples:" in result.out


def test_no_verb_is_usage(cli):
    result = cli()
    assert result.code == 2 and result.out == "" and "usage:" in result.err


def test_version(cli):
    assert cli("--version").out.startswith("r2r-glimp 0.")


@pytest.mark.parametrize(("verb", "hint"), [("generat", "did you mean generate"), ("x", "choose")])
def test_unknown_verb(cli, verb, hint):
    result = cli(verb)
    assert result.code == 2 and hint in result.error


@pytest.mark.parametrize("name", [name for name, _, _ in dispatcher.VERBS])
def test_help_of_a_verb_teaches(cli, name):
    result = cli(name, "--help")
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"usage: r2r-glimp {name}")
    assert f"examples:\n  r2r-glimp {name}" in result.out


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["chat", "--help"]])
def test_help_is_fast_and_imports_nothing_heavy(argv):
    code = (
        "import sys, json, r2r_glimp.cli.main as m; code = m.main(sys.argv[1:]);"
        "print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage:" in done.stdout
    assert not set(json.loads(done.stderr)) & set(HEAVY)
    # Time on a processor, so that a busy machine does not fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_importing_the_package_imports_no_torch():
    code = "import sys, r2r_glimp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (DataError, 2), (CheckpointError, 2), (EngineError, 1)],
)
def test_errors_are_one_line_with_an_exit_code(cli, verb, error, code):
    verb(raising(error("what,\n  where")))
    result = cli("test")
    assert (result.code, result.error) == (code, "what, where")


def test_unknown_exceptions_are_one_line(cli, verb):
    verb(raising(ZeroDivisionError("by\nzero")))
    result = cli("test")
    assert result.code == 1 and result.out == ""
    assert result.err.count("\n") == 1
    assert "internal error: ZeroDivisionError: by zero" in result.err and "--debug" in result.err


def test_debug_anywhere_adds_the_traceback(cli, verb):
    seen = []
    verb(lambda argv: seen.append(argv) or 1 / 0)
    result = cli("test", "a", "--debug", "--", "--debug")
    assert seen == [["a", "--", "--debug"]]
    assert result.code == 1 and "Traceback" in result.err


def test_out_of_memory_says_what_to_do(cli, verb):
    verb(raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")))
    result = cli("test")
    assert result.code == 1 and "--kv_memory" in result.error


def test_failing_to_write_names_the_file(cli, verb):
    verb(raising(OSError(28, "No space left on device", "/full/disk")))
    result = cli("test")
    assert (result.code, result.error) == (1, "/full/disk: No space left on device")


def test_ctrl_c_is_quiet(cli, verb):
    verb(raising(KeyboardInterrupt()))
    result = cli("test")
    assert result.code == 130 and result.err == "r2r-glimp: stopped: SIGINT\n"


def test_a_reader_that_is_gone_is_quiet():
    command = f"{sys.executable} -m r2r_glimp generate --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0].startswith("usage:")
    assert done.stdout.splitlines()[1] in ("0", "141")  # the help may fit the pipe
