"""Aligning the bundled SLM: the adapter is what PEFT trained, and whoever must know of it does."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from labeling.worker import ANSWERS_KEY
from r2r_glimp.core import CheckpointError
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.features import FeatureSpec
from r2r_glimp.routing.mlp import MLPConfig, MLPRouter, MLPRouterNet, Threshold
from training.align import main
from training.lora import AlignModule
from training.response_data import ResponseData
from training.responses import FILE, read_labeled

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configs" / "training" / "abacus-align.yaml"
SLM, LLM = (str(ROOT / "checkpoints" / f"abacus-{size}") for size in ("slm", "llm"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Where the first run left the LLM's responses; the later ones need not wait for them."""
    return tmp_path_factory.mktemp("kept") / FILE


@pytest.fixture
def arguments(tmp_path, monkeypatch, kept):
    """`arguments("--x", "y", name="a")`: a small run of that name, with further arguments."""
    monkeypatch.chdir(tmp_path)

    def make(*more: str, name: str = "adapter") -> list[str]:
        values = {
            "--config": str(PRESET),
            "--export_dir": f"checkpoints/{name}",
            "--trainer.default_root_dir": f"runs/{name}",
            "--data.count": "60",
            "--data.batch_size": "8",
            "--data.selection": "0.2",
            "--data.test": "0.2",
            "--trainer.max_epochs": "2",
            "--model.lr": "3e-4",
            "--wandb": "off",
        }
        file = Path(f"runs/{name}") / FILE
        if kept.exists() and not file.exists():
            file.parent.mkdir(parents=True)
            shutil.copyfile(kept, file)
        return [word for pair in values.items() for word in pair] + list(more)

    return make


def one_line(capsys) -> str:
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ")
    return last


def load_pair(*adapters: str) -> ModelPair:
    return ModelPair.from_pretrained(
        SLM, LLM, device="cpu", dtype="float32", slm_adapters=list(adapters)
    )


def test_end_to_end(arguments, capsys, kept):
    assert main(arguments("--json")) == 0
    captured = capsys.readouterr()
    shutil.copyfile(f"runs/adapter/{FILE}", kept)
    lines = captured.err.strip().splitlines()
    assert lines[0] == "the LLM writes 60 responses into runs/adapter/responses.jsonl"
    assert [line.split()[0] for line in lines[-3:]] == ["test", "adapter", "next"]
    summary = json.loads(captured.out)
    assert summary == json.loads(Path("runs/adapter/summary.json").read_text())
    test = summary["test"]
    assert test["after"]["loss"] < test["before"]["loss"]
    assert 0.5 < test["before"]["agreement"] < test["after"]["agreement"] < 1

    folder = Path("checkpoints/adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "alignment.json"),
        "training_config.yaml",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].endswith("abacus-slm")
    assert not {"embed_tokens", "lm_head"} & set(config["target_modules"])
    pair = load_pair(str(folder))
    told = json.loads((folder / "alignment.json").read_text())
    assert told["slm"]["weights_sha256"] == load_pair().slm.fingerprint.weights_sha256
    assert told["llm"]["weights_sha256"] == pair.llm.fingerprint.weights_sha256
    assert "| agreement |" in (folder / "README.md").read_text()

    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        plain = load_pair().slm.model
        before = plain(ids).logits.clone()
        wanted = PeftModel.from_pretrained(plain, str(folder)).eval()(ids).logits
        merged = pair.slm.model(ids).logits
    assert torch.allclose(merged, wanted, atol=1e-4) and not torch.allclose(merged, before)


def test_a_router_is_refused_where_its_slm_is_another(arguments):
    assert main(arguments("--trainer.max_epochs", "1")) == 0
    plain, aligned = load_pair().slm, load_pair("checkpoints/adapter").slm
    assert aligned.fingerprint.adapters == ("checkpoints/adapter",)
    hidden_size = plain.fingerprint.hidden_size
    config = MLPConfig(granularity="token", features=FeatureSpec(hidden_size=hidden_size))
    threshold = {"t": Threshold(value=0.5, calibrated_on="nothing")}
    for own, other in ((plain, aligned), (aligned, plain)):
        router = MLPRouter(MLPRouterNet(config), threshold, "t", own.fingerprint)
        router.bind(own)
        with pytest.raises(CheckpointError, match="trained on another SLM: adapters is"):
            router.bind(other)


CONSTANT = ("--model.schedule", "constant", "--model.warmup", "0", "--model.dropout", "0.1")


def same_weights(first: str, second: str) -> bool:
    one, two = (
        load_file(f"checkpoints/{name}/adapter_model.safetensors") for name in (first, second)
    )
    return all(torch.equal(one[name], two[name]) for name in one)


def test_resumed_equals_uninterrupted(arguments, monkeypatch, capsys):
    """After a finished epoch, and after a SIGTERM in the middle of one."""
    assert main(arguments(*CONSTANT, name="whole")) == 0
    assert main(arguments(*CONSTANT, "--trainer.max_epochs", "1", name="half")) == 0
    assert main(arguments(*CONSTANT, "--ckpt_path", "last", "--overwrite", name="half")) == 0
    assert same_weights("whole", "half")

    step = AlignModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 2:  # an epoch has 4 or 5
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AlignModule, "training_step", interrupted)
        assert main(arguments(*CONSTANT, name="cut")) == 143
    assert "--ckpt_path last goes on from here" in capsys.readouterr().err
    content = torch.load("runs/cut/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert all(".lora_" in name for name in content["state_dict"])  # the factors alone
    assert main(arguments(*CONSTANT, "--ckpt_path", "last", name="cut")) == 0
    assert same_weights("whole", "cut")
    again = ("--ckpt_path", "last", "--overwrite", "--model.rank", "4")
    assert main(arguments(*CONSTANT, *again, name="cut")) == 2
    assert "was made with model.rank=16, not 4" in one_line(capsys)


def test_responses_are_written_once_for_the_same_models(arguments, tmp_path):
    arguments()
    file = Path("runs/adapter") / FILE
    before = file.stat().st_mtime_ns
    data = ResponseData(count=60, max_tokens=200, selection=0.2, test=0.2)
    data.folder = file.parent
    data.load()
    assert file.stat().st_mtime_ns == before
    splits = {name: set(split.rows.tolist()) for name, split in data.splits.items()}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 60
    batch = data.batch("train", torch.arange(3).numpy())
    response = data.responses[data.splits["train"].rows[0]]
    assert batch.ids_BT[0][batch.written_BT[0]].tolist() == response.tokens
    file.write_text(file.read_text()[:-40])  # cut short: written again
    data = ResponseData(count=60, max_tokens=200, selection=0.2, test=0.2)
    data.folder = file.parent
    data.load()
    assert file.stat().st_mtime_ns != before and len(data.responses) == 60


def write_labeling(folder: Path, by: str = "llm", num_answers: int = 40) -> Path:
    """What a labeling run leaves, as far as it matters here."""
    answers = [
        {
            "question": f"Say hats {i % 10}, cups {i // 10}.",
            "response": f"Hats {i % 10}.\n\n</think>",
        }
        for i in range(num_answers)
    ]
    (folder / "shards").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"responses": {"by": by}}}))
    table = pa.table({"x": [1]}).replace_schema_metadata({ANSWERS_KEY: json.dumps(answers)})
    with pa.OSFile(str(folder / "shards" / "00000.arrow"), "wb") as sink:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return folder


def test_responses_of_a_labeling_run(arguments, tmp_path, capsys):
    folder = write_labeling(tmp_path / "labels")
    slm = load_pair().slm
    for path in (folder, folder / "dataset"):
        responses = read_labeled(str(path), slm)
        assert len(responses) == 40
        text = slm.tokenizer.decode(responses[12].tokens)
        assert text == "Hats 2.\n\n</think>" + slm.tokenizer.eos_token
        assert "Say hats 2, cups 1." in slm.tokenizer.decode(responses[12].prompt)
    assert main(arguments("--data.path", str(folder), "--trainer.max_epochs", "1")) == 0
    summary = json.loads(Path("runs/adapter/summary.json").read_text())
    assert sum(summary["responses"].values()) == 40
    capsys.readouterr()
    on_policy = write_labeling(tmp_path / "mixed", by="pair")
    assert main(arguments("--data.path", str(on_policy), name="other")) == 2
    assert "written by the routed pair" in one_line(capsys)
    shard = folder / "shards" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:100])
    assert main(arguments("--data.path", str(folder), name="other")) == 2
    assert "00000.arrow: no whole shard" in one_line(capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.rank", "0"), "model.rank=0 is out of range"),
        (("--model.targets", "[lm_head]"), "model.targets has lm_head: an adapter of embeddings"),
        (("--model.targets", "[query]"), "has query, of which this SLM has none: it has down_proj"),
        (("--data.count", "0"), "data.count=0 is out of range"),
        (("--data.selection", "1"), "leave no split to train on"),
        (("--data.path", "nothing"), "nothing: no shards"),
        (("--data.pair", "nobody"), "no pair is named 'nobody'"),
        (("--data.max_tokens", "1", "--data.count", "3"), "none of 3 responses came to an end"),
        (("--patience", "0"), "patience=0 is out of range"),
        (("--ckpt_path", "last"), "no last checkpoint at runs/adapter/checkpoints/last.ckpt"),
    ],
)
def test_guards(arguments, capsys, more, message):
    assert main(arguments(*more)) == 2 or "came to an end" in message
    assert message in one_line(capsys)
    assert not Path("checkpoints/adapter").exists()


def test_an_export_folder_that_holds_something_else(arguments, capsys):
    Path("checkpoints/adapter").mkdir(parents=True)
    Path("checkpoints/adapter/thesis.tex").write_text("years of work")
    assert main(arguments("--overwrite")) == 2
    assert "holds something else" in one_line(capsys)


def test_the_preset_is_valid_and_says_what_each_key_is(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in PRESET.read_text().splitlines() if line.strip() and line[0] != "#"]
    assert all("#" in line or line.endswith(":") for line in lines)
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(PRESET), "--print_config"])
    assert not stop.value.code
    config = yaml.safe_load(PRESET.read_text())
    assert config["model"]["rank"] == yaml.safe_load(capsys.readouterr().out)["model"]["rank"]


def test_importing_does_not_import_lightning():
    heavy = "{'lightning', 'torch', 'peft'} & sys.modules.keys()"
    code = f"import sys, training.align; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
