"""Splits, targets and the order of the batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r2r_glimp.core import CheckpointError, DataError, UsageError
from r2r_glimp.routing.features import FeatureSpec
from tests.tiny import make_tiny_model
from training.data import RouterData
from training.embedding import load_input_embedding

SPEC = FeatureSpec(hidden_size=32, top_k_logits=16)


def make_data(path: str, **options) -> RouterData:
    data = RouterData(path, **{"selection": 0.2, "test": 0.2, "batch_size": 128} | options)
    data.setup()
    data.spec = SPEC
    return data


def at(epoch: int, batch: int, rank: int = 0, world: int = 1) -> SimpleNamespace:
    """A trainer that has begun `batch` batches of an epoch."""
    loop = SimpleNamespace(batch_idx=batch - 1)
    return SimpleNamespace(current_epoch=epoch, fit_loop=loop, global_rank=rank, world_size=world)


def positions(data: RouterData, **when) -> list[float]:
    data.trainer = at(**when)
    return next(data.train_dataloader()).observation.entropy_N.tolist()


def test_splits_share_no_question_and_lose_no_row(world):
    data = make_data(world.path)
    questions = [set(data.rows.question[split.rows]) for split in data.splits.values()]
    assert sum(map(len, questions)) == 48 and len(set.union(*questions)) == 48
    assert sum(len(split.rows) for split in data.splits.values()) == data.rows.num_rows
    again, other = make_data(world.path), make_data(world.path, split_seed=1)
    assert np.array_equal(data.splits["test"].rows, again.splits["test"].rows)
    assert not np.array_equal(data.splits["test"].rows, other.splits["test"].rows)


def test_a_question_stays_in_its_split_when_others_come(world, write_dataset):
    few = {name: values[: 30 * 40] for name, values in world.columns.items()}
    whole, part = make_data(world.path), make_data(write_dataset(few))
    common = [row for row in whole.splits["train"].rows if row < 30 * 40]
    assert part.splits["train"].rows.tolist() == common


def test_token_targets(world):
    labels = world.columns["label"]
    for positive, lowest in (("divergent", 2), ("different", 1)):
        split = make_data(world.path, positive=positive).splits["train"]
        assert np.array_equal(split.targets, labels[split.rows] >= lowest)
        assert (split.weights == 1).all()


def test_step_targets_and_the_tokens_that_hang_on_them(world, write_dataset):
    columns = dict(world.columns)
    columns["phase"] = (columns["position"] >= 38).astype(np.int8)  # the last step has 3 tokens
    columns["step_label"] = np.where(columns["position"] == 10, -1, columns["step_label"])
    split = make_data(write_dataset(columns), granularity="step").splits["train"]
    starts = columns["position"][split.rows]
    assert set(starts) == {0, 5, 15, 20, 25, 30, 35}
    assert np.array_equal(split.targets, columns["step_label"][split.rows] >= 2)
    assert np.array_equal(split.weights, np.where(starts == 35, 3, 5))


def test_the_order_is_a_function_of_seed_and_epoch(world):
    data = make_data(world.path)
    num_rows = len(data.splits["train"].rows)
    data.trainer = at(0, 0)
    num_batches = len(data.train_dataloader())
    assert num_batches == -(-num_rows // 128)
    epoch = [value for b in range(num_batches) for value in positions(data, epoch=0, batch=b)]
    assert sorted(epoch) == sorted(data.rows.entropy[data.splits["train"].rows].tolist())
    assert positions(data, epoch=3, batch=2) == positions(data, epoch=3, batch=2)
    assert positions(data, epoch=3, batch=2) != positions(data, epoch=4, batch=2)
    assert positions(make_data(world.path, seed=1), epoch=3, batch=2) != positions(
        data, epoch=3, batch=2
    )


def test_processes_deal_out_the_same_rows(world):
    one, two = make_data(world.path, batch_size=128), make_data(world.path, batch_size=64)
    whole = positions(one, epoch=1, batch=3)
    shares = [positions(two, epoch=1, batch=3, rank=rank, world=2) for rank in range(2)]
    assert sorted(whole) == sorted(shares[0] + shares[1])
    two.trainer = at(0, 0, rank=1, world=2)
    selection = torch.cat([batch.targets_B for batch in two.val_dataloader()])
    assert len(selection) == len(two.splits["selection"].rows) // 2
    assert sum(1 for _ in two.val_dataloader()) == len(two.val_dataloader())


def test_the_embedding_is_read_from_the_files(world):
    data = make_data(world.path)
    expected = world.slm.model.get_input_embeddings().weight
    assert torch.equal(data.input_embedding(), expected.bfloat16())


def test_another_slm_is_refused(world, tokenizer, tmp_path):
    make_tiny_model("qwen3", tokenizer, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not the SLM the dataset was made with"):
        make_data(world.path, slm=str(tmp_path / "other")).input_embedding()
    embedding_VH = load_input_embedding(str(tmp_path / "other"), None)
    assert embedding_VH.shape[1] == 32


def test_a_dataset_that_does_not_say_its_slm(world, write_dataset):
    data = make_data(write_dataset(world.columns))
    with pytest.raises(UsageError, match="give its folder as data.slm"):
        data.input_embedding()
    data.slm = world.slm.name
    assert data.input_embedding().shape[1] == 32


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda c: c["label"].fill(0), {}, "train split has no divergent rows among its"),
        (lambda c: c["label"].fill(2), {}, "train split has only divergent rows"),
        (lambda c: c["label"].put(7, 5), {}, "position 7.: label is 5, not 0 to 2"),
        (lambda c: c["step_start"].fill(False), {"granularity": "step"}, "has no step rows"),
        (lambda c: c["question_id"].__setitem__(3, "q9"), {}, "'q0-r0' belongs to two questions"),
        (
            lambda c: None,
            {"selection": 1e-9},
            "the selection split has no token rows .48 questions",
        ),
    ],
)
def test_data_that_teaches_nothing(world, write_dataset, change, options, message):
    columns = {name: values.copy() for name, values in world.columns.items()}
    change(columns)
    with pytest.raises(DataError, match=message):
        make_data(write_dataset(columns), **options)


def test_a_question_in_two_splits_is_a_leak(world, tmp_path):
    from datasets import DatasetDict

    from labeling.schema import labeled_dataset

    dataset = labeled_dataset(world.columns)
    cuts = {"train": range(0, 1000), "selection": range(1000, 1500), "test": range(1480, 1920)}
    DatasetDict({name: dataset.select(rows) for name, rows in cuts.items()}).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="question 'q37' is in two splits: a leak"):
        make_data(str(tmp_path))


def test_impossible_numbers():
    with pytest.raises(UsageError, match="batch_size=0"):
        RouterData("x", batch_size=0)
    with pytest.raises(UsageError, match="leave no split to train on"):
        RouterData("x", selection=0.5, test=0.5)
