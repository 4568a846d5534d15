"""The command: a run end to end, its guards one by one, signals and resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from r2r_glimp.hub import load_router
from r2r_glimp.hub.checkpoint import FILES, RouterCheckpoint
from training.fit import main
from training.module import RouterModule

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    set((ROOT / "configs" / "training").glob("*.yaml"))
    - {ROOT / "configs/training/abacus-align.yaml"}
)


@pytest.fixture
def arguments(world, tmp_path, monkeypatch):
    """`arguments("--x", "y", name="a")`: a small run of that name, with further arguments."""
    monkeypatch.chdir(tmp_path)

    def make(*more: str, name: str = "router") -> list[str]:
        values = {
            "--config": str(ROOT / "configs" / "training" / "abacus-token.yaml"),
            "--export_dir": f"checkpoints/{name}",
            "--trainer.default_root_dir": f"runs/{name}",
            "--data.path": world.path,
            "--data.selection": "0.2",
            "--data.test": "0.2",
            "--data.batch_size": "128",
            "--model.top_k_logits": "16",
            "--model.width": "32",
            "--trainer.max_epochs": "4",
            "--wandb": "off",
        }
        return [word for pair in values.items() for word in pair] + list(more)

    return make


def one_line(capsys) -> str:
    """What the run said on stderr, of which the last line is the error."""
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ")
    return last


def same_weights(first: str, second: str) -> bool:
    one, two = (load_file(f"checkpoints/{name}/model.safetensors") for name in (first, second))
    return all(torch.equal(one[name], two[name]) for name in one)


def test_fit_end_to_end(arguments, world, capsys):
    assert main(arguments("--json", "--model.lr", "0.01", "--trainer.max_epochs", "6")) == 0
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert [line.split()[0] for line in lines[-5:]] == "test threshold LLM router next".split()
    assert sum(line.startswith("epoch ") for line in lines) == 6
    summary = json.loads(captured.out)
    assert summary == json.loads(Path("runs/router/summary.json").read_text())
    assert summary["test"]["test/ap"] > 0.7  # 0.15 by chance
    assert summary["recall"] >= 0.95 and 0 < summary["llm_share"] < 0.6

    folder = Path("checkpoints/router")
    assert {path.name for path in folder.iterdir()} == set(FILES) - {
        "traffic.json"
    }  # calibration's
    config = RouterCheckpoint.from_pretrained(folder).config
    assert config.slm == world.slm.fingerprint == config.llm
    assert config.threshold.value == summary["threshold"]
    assert config.metrics == summary["test"]
    counts = [config.trained_on[name] for name in ("rows", "selection_rows", "test_rows")]
    assert sum(counts) == len(world.columns["label"])
    told = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert told["model"]["width"] == 32 and told["data"]["path"] == world.path


def test_the_engine_scores_as_the_trainer_did(arguments, world):
    from training.data import RouterData
    from training.export import score_split

    assert main(arguments("--trainer.max_epochs", "2")) == 0
    data = RouterData(world.path, selection=0.2, test=0.2)
    data.setup()
    module = RouterModule(top_k_logits=16, width=32)
    module.prepare(data)
    module.net.load_state_dict(load_file("checkpoints/router/model.safetensors"))
    trained, _, _ = score_split(module, data, "test")

    router = load_router("checkpoints/router")
    router.bind(world.slm)  # in float32, as the engine may run it
    signals = world.signals
    signals.uniforms = [0.5] * len(signals.positions)
    served = router.score(signals.rows(data.splits["test"].rows.tolist()))
    assert torch.allclose(served, trained, atol=1e-5, rtol=0)


def test_scores_are_probabilities_in_spite_of_the_class_weight(arguments):
    assert main(arguments("--model.dropout", "0.3", "--trainer.max_epochs", "3")) == 0
    metrics = RouterCheckpoint.from_pretrained("checkpoints/router").config.metrics
    assert metrics["test/calibration_error"] < 0.12  # 0.3 and more with the weight alone


def test_step_granularity(arguments, world):
    assert main(arguments("--data.granularity", "step", "--data.positive", "different")) == 0
    config = RouterCheckpoint.from_pretrained("checkpoints/router").config
    assert config.model.granularity == "step"
    assert config.trained_on["positive"] == "different"
    assert load_router("checkpoints/router").threshold("step") == config.threshold.value


def test_dry_run_exports_an_untrained_router(arguments):
    assert main(arguments("--dry_run")) == 0
    config = RouterCheckpoint.from_pretrained("checkpoints/router").config
    assert config.trained_on["untrained"] == "yes"
    assert "**Untrained**" in Path("checkpoints/router/README.md").read_text()
    assert not Path("runs/router/checkpoints").exists()


CONSTANT = ("--model.schedule", "constant", "--model.warmup", "0")


def test_resumed_equals_uninterrupted(arguments):
    """After a finished epoch, and after a SIGTERM in the middle of one."""
    assert main(arguments(*CONSTANT, name="whole")) == 0
    assert main(arguments(*CONSTANT, "--trainer.max_epochs", "2", name="half")) == 0
    more = ("--ckpt_path", "last", "--overwrite")
    assert main(arguments(*CONSTANT, *more, name="half")) == 0
    assert same_weights("whole", "half")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_epoch(arguments, monkeypatch, capsys, signum):
    assert main(arguments(name="whole")) == 0
    step = RouterModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 14:  # an epoch has 8 or 9
            os.kill(os.getpid(), signum)
        return step(self, batch, batch_idx)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(RouterModule, "training_step", interrupted)
        assert main(arguments(name="cut")) == 128 + signum
    assert signal.getsignal(signum) is before
    assert "--ckpt_path last goes on from here" in capsys.readouterr().err
    assert not Path("checkpoints/cut").exists()
    content = torch.load("runs/cut/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 15
    assert main(arguments("--ckpt_path", "last", name="cut")) == 0
    assert same_weights("whole", "cut")


def test_a_signal_in_the_last_batch_of_an_epoch(arguments, monkeypatch):
    assert main(arguments(name="whole")) == 0
    validate = RouterModule.validation_step

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(RouterModule, "validation_step", interrupted)
        assert main(arguments(name="cut")) == 143
    assert main(arguments("--ckpt_path", "last", name="cut")) == 0
    assert same_weights("whole", "cut")


def test_a_row_that_is_not_finite(arguments, world, write_dataset, capsys):
    for name, value, what in (("hidden", 0x7FC0, "hidden"), ("entropy", np.inf, "entropy")):
        columns = world.columns | {name: world.columns[name].copy()}
        columns[name][85] = value
        path = write_dataset(columns, world.slm)
        assert main(arguments("--data.path", path)) == 2
        line = one_line(capsys)
        assert f"row 85 (response 'q2-r0', position 5) has a NaN or infinite {what}" in line


def test_a_loss_that_is_not_finite(arguments, monkeypatch, capsys):
    forward = RouterModule.forward
    monkeypatch.setattr(
        RouterModule,
        "forward",
        lambda self, b: forward(self, b) * (1 if self.global_step < 3 else np.nan),
    )
    assert main(arguments()) == 2
    assert "the loss is nan at step 3: lower model.lr=0.001" in one_line(capsys)
    assert not Path("checkpoints/router").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.selection", "1e-9"), "the selection split has no token rows"),
        (("--data.path", "nothing"), "nothing: no such folder"),
        (("--model.hidden_size", "64"), "hidden states are 32 wide, model.hidden_size=64"),
        (("--model.top_k_logits", "17"), "16 logits were kept, model.top_k_logits=17 wants more"),
        (("--ckpt_path", "last"), "no last checkpoint at runs/router/checkpoints/last.ckpt"),
        (("--ckpt_path", "x.ckpt"), "no checkpoint at x.ckpt"),
        (("--wandb", "online"), "no W&B key: `wandb login`"),
        (("--patience", "0"), "patience=0 is out of range"),
        (("--model.lr", "-1"), "model.lr=-1.0 is out of range"),
        (("--model.blocks", "1000"), "blocks=1000 is out of range"),
        (("--data.slm", "./elsewhere"), "elsewhere: no such folder"),
        (("--trainer.accelerator", "mps"), "MPSAccelerator"),
    ],
)
def test_guards(arguments, capsys, monkeypatch, more, message):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    assert main(arguments(*more)) == 2
    assert message in one_line(capsys)
    assert not Path("checkpoints/router").exists()


def test_one_class(arguments, world, write_dataset, capsys):
    columns = world.columns | {"label": np.zeros_like(world.columns["label"])}
    assert main(arguments("--data.path", write_dataset(columns, world.slm))) == 2
    assert "the train split has no divergent rows" in one_line(capsys)


def test_an_export_folder_that_is_there(arguments, capsys):
    assert main(arguments("--dry_run")) == 0
    assert main(arguments("--dry_run")) == 2
    assert "checkpoints/router is there already: choose another folder" in one_line(capsys)
    assert main(arguments("--dry_run", "--overwrite")) == 0
    Path("checkpoints/mine").mkdir()
    Path("checkpoints/mine/thesis.tex").write_text("years of work")
    assert main(arguments("--dry_run", "--overwrite", name="mine")) == 2
    assert "holds something else" in one_line(capsys)


def test_a_checkpoint_that_does_not_fit(arguments, capsys):
    assert main(arguments("--trainer.max_epochs", "1")) == 0
    again = ("--ckpt_path", "last", "--overwrite")
    assert main(arguments(*again, "--model.width", "16")) == 2
    assert "was made with model.width=32, not 16" in one_line(capsys)
    last = Path("runs/router/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:1000])
    assert main(arguments(*again)) == 2
    assert "last.ckpt: truncated, or no checkpoint of a training run" in one_line(capsys)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model.lrr", "3", "unrecognized arguments: --model.lrr 3"),
        ("--model.lr", "fast", "model.lr: expected a number, got 'fast'"),
        ("--config", "nowhere.yaml", "File does not exist"),
    ],
)
def test_a_mistyped_option_is_one_line(arguments, capsys, option, value, message):
    assert main(arguments(option, value)) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_are_valid_and_say_what_each_key_is(path, arguments, capsys):
    lines = [line for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    assert all("#" in line or line.endswith(":") for line in lines)
    config = yaml.safe_load(path.read_text())
    assert config["data"]["granularity"] in path.stem
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(path), "--print_config"])
    assert not stop.value.code
    assert config["model"]["width"] == yaml.safe_load(capsys.readouterr().out)["model"]["width"]


def test_wandb_offline_gets_curves_table_and_artifact(arguments, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    assert main(arguments("--wandb", "auto", "--trainer.max_epochs", "1")) == 0
    assert "no W&B key: curves stay in runs/router/wandb" in capsys.readouterr().err
    (run,) = Path("runs/router/wandb").glob("offline-run-*")
    wanted = {b"selection/ap", b"thresholds", b"test/ap", b"model.safetensors"}
    for _ in range(100):  # wandb's own process writes the file a moment later
        logged = next(run.glob("run-*.wandb")).read_bytes()
        missing = {name for name in wanted if name not in logged}
        if not missing:
            break
        time.sleep(0.1)
    assert not missing


def test_importing_training_does_not_import_lightning():
    heavy = "{'lightning', 'torch', 'datasets'} & sys.modules.keys()"
    code = f"import sys, training, training.fit; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_two_processes(arguments, world):
    ddp = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "64")
    command = [sys.executable, "-m", "training.fit", *arguments(*ddp, "--model.lr", "0.01")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("next       r2r-glimp calibrate") == 1
    assert json.loads(Path("runs/router/summary.json").read_text())["test"]["test/ap"] > 0.7
    shutil.rmtree("checkpoints/router")
