"""Reading a labeled dataset: whole batches, the same numbers from disk as were written."""

import json
import shutil

import numpy as np
import pytest
import torch

from labeling.schema import labeled_dataset, labeled_features
from r2r_glimp.core import DataError
from r2r_glimp.routing.features import FeatureSpec, observe
from training.rows import LabeledRows

SPEC = FeatureSpec(hidden_size=32, top_k_logits=16)


def test_whole_batches_are_what_was_observed(world):
    rows = LabeledRows(world.path)
    seen = observe(world.signals, SPEC)
    picked = np.random.default_rng(0).permutation(rows.num_rows)[:300]
    batch = rows.observe(picked, SPEC)
    assert len(rows.hidden.chunks) == 2  # two shards on disk
    for name in ("hidden_NH", "top_logits_NK", "candidates_N", "entropy_N", "margin_N"):
        stored, direct = getattr(batch, name), getattr(seen, name)[torch.from_numpy(picked)]
        assert torch.equal(stored, direct), name
        assert stored.dtype == direct.dtype


def test_facts_of_a_row(world):
    rows = LabeledRows(world.path)
    assert (rows.hidden_size, rows.top_k, rows.num_rows) == (32, 16, 48 * 40)
    assert rows.name_of(41) == "row 41 (response 'q1-r0', position 1)"
    assert rows.fingerprint("slm") == world.slm.fingerprint
    assert rows.split is None


def test_the_wide_columns_stay_on_disk(world):
    rows = LabeledRows(world.path)
    assert not rows.hidden.chunks[0].flags.owndata
    assert not rows.hidden.chunks[0].flags.writeable


def test_parquet_and_explicit_splits(world, tmp_path):
    dataset = labeled_dataset(world.columns)
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    whole = LabeledRows(str(tmp_path))
    spec = FeatureSpec(hidden_size=32, top_k_logits=0)
    every = np.arange(whole.num_rows)
    stored = whole.observe(every, spec).hidden_NH
    assert torch.equal(stored, observe(world.signals, spec).hidden_NH)
    assert whole.split is None

    for name, part in zip(("train", "selection", "test"), (0, 800, 1600), strict=True):
        rows = range(part, min(part + 800, len(dataset)))
        dataset.select(rows).to_parquet(tmp_path / "split" / f"{name}.parquet")
    split = LabeledRows(str(tmp_path / "split")).split
    assert np.bincount(split).tolist() == [800, 800, 320]


def test_an_indirection_is_resolved(world, tmp_path):
    labeled_dataset(world.columns).select([5, 3, 900]).save_to_disk(tmp_path / "picked")
    assert LabeledRows(str(tmp_path / "picked")).position.tolist() == [5, 3, 20]


def refusal(path: object) -> str:
    with pytest.raises(DataError) as error:
        LabeledRows(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_read(world, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "holds no dataset: `python -m labeling`" in refusal(tmp_path)
    labeled_dataset(world.columns).select([]).save_to_disk(tmp_path / "empty")
    assert "no rows" in refusal(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in refusal(tmp_path / "broken")


def test_another_schema_is_refused(world, tmp_path):
    dataset = labeled_dataset(world.columns)
    dataset.remove_columns("margin").save_to_disk(tmp_path / "fewer")
    assert "no column margin" in refusal(tmp_path / "fewer")
    wrong = dict(labeled_features(32, 16))
    wrong["label"] = type(wrong["label"])("int64")
    dataset.cast(type(dataset.features)(wrong)).save_to_disk(tmp_path / "other")
    assert "column label is Value('int64'), wanted Value('int8')" in refusal(tmp_path / "other")
    missing = labeled_dataset(world.columns | {"source": [None] * len(dataset)})
    missing.save_to_disk(tmp_path / "missing")
    assert "column source has missing values" in refusal(tmp_path / "missing")


def test_a_broken_info_file(world, tmp_path):
    shutil.copytree(world.path, tmp_path / "data")
    (tmp_path / "data" / "info.json").write_text("{")
    assert "info.json is not valid JSON" in refusal(tmp_path / "data")
    (tmp_path / "data" / "info.json").write_text(json.dumps([]))
    assert "info.json holds a list" in refusal(tmp_path / "data")
