"""The command line of labeling: presets, overrides, help, errors of one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from labeling.__main__ import main, parse
from r2r_glimp.core import UsageError
from r2r_glimp.models import read_preset

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs" / "labeling").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_say_what_each_key_does(path: Path) -> None:
    config = parse(["--config", str(path)])
    assert config.out == f"runs/labels/{path.stem}"
    assert read_preset(config.pair)
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    for line in text.splitlines():
        key = re.match(r"\s*(\w+): +[^\s{]", line)
        if key and key[1] not in ("kind", "template", "where", "url"):
            assert "#" in line, f"{path.name}: {line.strip()} has no comment"


def test_there_are_the_promised_presets() -> None:
    names = {path.stem for path in PRESETS}
    assert names >= {"abacus", "aime", "gpqa", "bespoke-stratos", "livecodebench"}


def test_overrides_and_flags() -> None:
    preset = str(ROOT / "configs" / "labeling" / "abacus.yaml")
    argv = ["--config", preset, "--limit", "9", "--overwrite", "--json", "--source.seed", "5"]
    config = parse([*argv, "--responses.sampling.temperature", "0.6"])
    assert (config.limit, config.overwrite, config.json, config.debug) == (9, True, True, False)
    assert config.source.seed == 5 and config.source.count == 6000
    assert config.responses.sampling.temperature == 0.6
    assert parse([]).pair == "abacus"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nope", "1"], "nope"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--limit", "many"], "limit: expected .*int.*got 'many'"),
        (["--granularity", "word"], "granularity: expected .*token.*got 'word'"),
        (["--branches.until", "sentence"], "verifier.kind=answer compares final answers"),
        (["--limit", "0"], "limit=0 is out of range: 1 or more"),
        (["--num_shards", "2", "--shard_index", "2"], "shard_index=2 is out of range: 0 to 1"),
        (["--num_shards", "2", "--overwrite"], "overwrite would throw away"),
        (["--responses.n", "3"], "responses.n=3 would be 3 times the same text"),
        (["--responses.by", "pair"], "responses.router and responses.by=pair go together"),
        (["--candidate.temperature", "-1"], "temperature=-1.0 is out of range"),
        (["--pair", "no-such-pair", "--out", "{tmp}"], "no pair is named 'no-such-pair'"),
    ],
)
def test_errors_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([word.replace("{tmp}", str(tmp_path / "out")) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line


def test_broken_yaml(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, message in [("a: [", "x.yaml|pars"), ("limits: 3", "limits"), ("limit: x", "limit")]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message) as raised:
            parse(["--config", str(path)])
        assert "\n" not in str(raised.value)


def test_help_and_config_import_no_torch() -> None:
    for argument in ("--help", "--print_config"):
        code = (
            "import sys; from labeling.__main__ import main\n"
            f"try: main([{argument!r}])\nexcept SystemExit as e: assert not e.code\n"
            "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
            "sys.exit(str(heavy) if heavy else 0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "verifier" in done.stdout


def test_a_whole_run_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = str(ROOT / "configs" / "labeling" / "abacus.yaml")
    out = tmp_path / "out"
    argv = ["--config", preset, "--out", str(out), "--limit", "3", "--engine.kv_memory", "64MiB"]
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["counts"]["questions"] == 3
    assert "3/3 questions" in captured.err and "tokens/s" in captured.err
    assert f"dataset: {out / 'dataset'}" in captured.err
    assert main([*argv, "--limit", "4", "--shard_size", "3"]) == 2
    assert "was begun with shard_size=128, and now it is 3" in capsys.readouterr().err
