"""The thin verbs: their helps are fast, and they say and do what the libraries behind them do."""

import json
import logging
import resource
import subprocess
import sys

import pytest
import torch

from r2r_glimp.cli.fit import find_preset
from r2r_glimp.hub import load_router
from tests.hub.conftest import FINGERPRINT, folder, hub, make_checkpoint  # noqa: F401
from tests.hub.test_import_r2r import theirs, write  # noqa: F401

REPO = "acme/small-router"
VERBS = ("label", "fit", "calibrate", "push", "pull", "import-r2r")
HEAVY = {"torch", "transformers", "lightning", "datasets", "huggingface_hub", "matplotlib", "peft"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_fast_and_imports_nothing_heavy(verb):
    code = (
        "import sys, json, r2r_glimp.cli.main as m; code = m.main(sys.argv[1:]);"
        "print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: r2r-glimp {verb}")
    assert not set(json.loads(done.stderr)) & HEAVY
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_helps_tell_the_options(cli):
    assert "--verifier.kind" in cli("label", "--help").out
    fit = cli("fit", "--help").out
    assert "--ckpt_path" in fit and "  width: 64" in fit and "# of the network" in fit
    calibrate = cli("calibrate", "--help").out
    for option in ("--target_llm_share", "--target_recall", "--target_avg_params", "--mixture"):
        assert option in calibrate


@pytest.mark.parametrize(
    ("verb", "home"), [("label", "labeling.__main__"), ("fit", "training.fit")]
)
def test_pipelines_get_their_arguments_and_give_their_exit_code(cli, monkeypatch, verb, home):
    seen = []
    monkeypatch.setattr(f"{home}.main", lambda argv: seen.append(argv) or 143)
    assert cli(verb, "--config", "x.yaml").code == 143
    assert cli(verb, "--config", "x.yaml", "--debug").code == 143
    assert seen == [["--config", "x.yaml"], ["--config", "x.yaml", "--debug"]]
    assert logging.getLogger("r2r_glimp").propagate


def test_label_refuses_in_one_line(cli, tmp_path):
    result = cli("label", "--source.kind", "file", "--source.path", tmp_path / "none.jsonl",
                 "--source.answer", "abacus", "--out", tmp_path / "out")  # fmt: skip
    assert result.code == 2
    assert result.err.count("\n") == 1 and "none.jsonl: no such file" in result.err


def test_the_preset_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_preset("abacus-token").is_file()


def test_push_dry_run(cli, folder, hub):  # noqa: F811
    result = cli("push", folder, REPO, "--dry_run", "--private", "--json")
    assert result.code == 0 and hub.requests == []
    facts = json.loads(result.out)
    assert facts["private"] and facts["commit"] is None and facts["revision"] == "main"
    assert {"config.json", "model.safetensors"} < {file["name"] for file in facts["files"]}
    assert (
        f"would push the private model {REPO}" in result.err and "model.safetensors" in result.err
    )


def test_push_then_pull(cli, folder, hub, make_checkpoint, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    result = cli("push", folder, REPO, "--revision", "v1")
    assert result.code == 0 and result.out == "" and "branch v1" in result.err
    assert set(hub.repos[REPO].branches["v1"]) > {"config.json", "README.md"}
    result = cli("pull", REPO, "--revision", "v1", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts == {"repo": REPO, "revision": "v1", "path": "checkpoints/small-router"}
    weights = load_router(facts["path"]).net.state_dict()
    assert torch.equal(weights["head.weight"], make_checkpoint().tensors["head.weight"])
    again = cli("pull", REPO, "--revision", "v1")
    assert again.code == 2 and "is there already" in again.error
    assert cli("pull", REPO, "--revision", "v1", "--overwrite").code == 0
    assert cli("pull", REPO, "--revision", "v1", "--out", "mine").code == 0
    missing = cli("pull", "acme/other")
    assert missing.code == 2 and "acme/other: no such repository" in missing.error


def test_push_a_dataset(cli, hub, tmp_path):  # noqa: F811
    (tmp_path / "labels" / "data").mkdir(parents=True)
    (tmp_path / "labels" / "README.md").write_text("# Labels\n")
    (tmp_path / "labels" / "data" / "train.parquet").write_bytes(b"PAR1")
    result = cli("push", tmp_path / "labels", "acme/labels", "--dry_run")
    assert result.code == 0 and "would push the dataset acme/labels" in result.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("push", "FOLDER", "a+b/c"), "'a+b/c' is not a Hub id"),
        (("push", "nothing", REPO), "nothing: no such folder"),
        (("push", "FOLDER"), "repo"),
        (("push", "FOLDER", REPO, "--dryrun"), "did you mean --dry_run?"),
        (("pull", "small"), "'small' is not a Hub id"),
        (("import-r2r", "nothing.pt", "--out", "out"), "nothing.pt: no such file"),
        (("import-r2r", "nothing.pt"), "out"),
        (("import-r2r", "nothing.pt", "--out", "FOLDER"), "is there already"),
        (("import-r2r", "nothing.pt", "--out", "out", "--slm", "./none"), "none"),
    ],
)
def test_one_line_where_it_cannot_be(cli, folder, monkeypatch, tmp_path, args, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    result = cli(*(folder if arg == "FOLDER" else arg for arg in args))
    assert result.code == 2 and message in result.error


def test_import_r2r(cli, write, models, tmp_path):  # noqa: F811
    file = write()
    result = cli("import-r2r", file, "--out", tmp_path / "router", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["threshold"] == 0.41 and not facts["bound"]
    assert "any SLM of its width" in result.err and "calibrate --router" in result.err
    assert load_router(tmp_path / "router").threshold("token") == 0.41
    wide = cli("import-r2r", file, "--out", tmp_path / "other", "--slm", models / "slm")
    assert wide.code == 2 and "made for hidden size 8" in wide.error
    assert not (tmp_path / "other").exists()
