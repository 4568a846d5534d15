"""Training the bundled models again: resumable to the bit, on what each is meant to know."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r2r_glimp.abacus import train
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
    args = train.argparse.Namespace(size="llm", seed=0, batch=4, steps=100, curriculum=0.15)
    ids, weights = train.make_batch(9, args, tokenizer)
    again, _ = train.make_batch(9, args, tokenizer)
    other, _ = train.make_batch(10, args, tokenizer)
    assert torch.equal(ids, again) and ids.shape == weights.shape
    assert ids.shape != other.shape or not torch.equal(ids, other)
    # The prompt is not trained on, and wording that does not matter counts little.
    assert (weights[:, :8] == 0).all()
    assert {round(weight, 3) for weight in weights.unique().tolist()} <= {0.0, 0.1, 1.0}


def test_the_slm_never_sees_a_product_it_should_not_know() -> None:
    rng = random.Random(0)
    for size, recipe in train.RECIPES.items():
        products = set()
        for _ in range(200):
            prompt, _ = train.make_example(rng, 1.0, 0.15, recipe.products)
            products.add("Product" in prompt)
        assert products == {True, False}, size
    known = train.RECIPES["slm"].products
    drawn = [train.draw_problem(rng, train.LEVELS, known) for _ in range(200)]
    assert max(problem.hardest_product() for problem in drawn) == known
    assert {problem.split() for problem in drawn} == {"train"}
