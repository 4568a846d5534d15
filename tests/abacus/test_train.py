"""Training the bundled models again: resumable to the bit, and the table's command runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r2r_glimp.abacus import table, train
from r2r_glimp.models import ModelPair


def run(folder: Path, out: str) -> dict[str, torch.Tensor]:
    train.main(
        ["--size", "slm", "--steps", "12", "--batch", "4", "--eval_every", "5", "--threads", "1"]
        + ["--eval_problems", "1", "--run_dir", str(folder), "--out", str(folder / out)]
    )
    return load_file(folder / out / "model.safetensors")


def test_a_killed_run_goes_on_and_ends_where_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(tmp_path / "a", "model")

    def killed(*args: object) -> dict[int, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "accuracy", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", "model")
    resumed = run(tmp_path / "b", "model")
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    # What it exports loads as a model of a pair.
    folder = tmp_path / "b" / "model"
    pair = ModelPair.from_pretrained(folder, folder, device="cpu")
    assert pair.slm.num_parameters < 200_000


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokenizer = train.build_tokenizer()
    args = train.argparse.Namespace(seed=0, batch=4, steps=100, curriculum=0.15)
    ids, weights = train.make_batch(9, args, tokenizer)
    again, _ = train.make_batch(9, args, tokenizer)
    other, _ = train.make_batch(10, args, tokenizer)
    assert torch.equal(ids, again) and ids.shape == weights.shape
    assert ids.shape != other.shape or not torch.equal(ids, other)
    # The prompt is not trained on, and wording that does not matter counts little.
    assert (weights[:, :8] == 0).all()
    assert {round(weight, 3) for weight in weights.unique().tolist()} <= {0.0, 0.1, 1.0}


def test_the_table_prints_every_system(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "SHARES", (0.3,))
    assert table.main(["--problems", "15", "--calibration", "5", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    systems = [(row["system"], row["granularity"]) for row in rows]
    assert systems == [
        ("slm", "-"), ("llm", "-"), ("entropy", "token"), ("random", "token"),
        ("entropy", "step"), ("random", "step"),
    ]  # fmt: skip
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    assert table.main(["--problems", "5", "--calibration", "2"]) == 0
    assert "| llm | - |" in capsys.readouterr().out


def test_wilson_intervals() -> None:
    assert table.wilson(500, 1000) == pytest.approx((0.469, 0.531), abs=1e-3)
    assert table.wilson(0, 20)[0] == pytest.approx(0.0, abs=1e-9)
