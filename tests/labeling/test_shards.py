"""Shards: resumed, refused, redone; one writer at a time."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from labeling import files
from labeling.config import LabelingConfig
from labeling.run import run
from labeling.sections import BranchConfig, EngineConfig, SourceConfig, VerifierConfig
from labeling.shards import ShardStore, find_difference
from labeling.worker import Worker
from r2r_glimp.core import DataError, EngineError, UsageError
from r2r_glimp.models import ModelPair

MakeConfig = Callable[..., LabelingConfig]


def contents(out: Path) -> dict[str, bytes]:
    """What a run made of its questions: everything but clocks and locks."""
    kept = [*sorted((out / "shards").iterdir()), *sorted((out / "dataset").iterdir())]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in kept}


@pytest.fixture
def config(make_config: MakeConfig) -> LabelingConfig:
    """Six questions in three shards, quickly labeled."""
    return make_config(shard_size=2, verifier=VerifierConfig(kind="identical"))


@pytest.fixture
def labeled(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the shards that were labeled, as they are."""
    found: list[int] = []
    original = Worker.label

    def label(self: Worker, shard, run_sha256):  # type: ignore[no-untyped-def]
        found.append(shard.index)
        return original(self, shard, run_sha256)

    monkeypatch.setattr(Worker, "label", label)
    return found


def test_what_is_finished_is_not_done_again(
    pair: ModelPair, config: LabelingConfig, labeled: list[int]
) -> None:
    first = run(replace(config, limit=3), pair)
    assert labeled == [0, 1] and first is not None and first["counts"]["questions"] == 3
    second = run(config, pair)  # the half shard 1 has grown
    assert labeled == [0, 1, 1, 2] and second is not None and second["counts"]["questions"] == 6
    before = contents(config.out_dir)
    times = {p: p.stat().st_mtime_ns for p in (config.out_dir / "dataset").iterdir()}
    assert run(config, pair) == second
    assert labeled == [0, 1, 1, 2]
    assert {p: p.stat().st_mtime_ns for p in times} == times  # not even built again
    whole = replace(config, out=config.out + "-whole")
    run(whole, pair)
    assert contents(whole.out_dir) == before


def test_a_corrupted_shard_is_done_again(
    pair: ModelPair, config: LabelingConfig, labeled: list[int]
) -> None:
    run(config, pair)
    before = contents(config.out_dir)
    path = config.out_dir / "shards" / "00001.arrow"
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:-1] + b"x", b""):
        path.write_bytes(broken)
        labeled.clear()
        run(config, pair)
        assert labeled == [1]
        assert contents(config.out_dir) == before
    path.unlink()
    manifest = config.out_dir / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-40])  # a torn line
    run(config, pair)
    assert contents(config.out_dir) == before
    lines = manifest.read_text().splitlines()
    assert json.loads(lines[-1])["shard"] == 2 or json.loads(lines[-1])["shard"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": VerifierConfig()}, "verifier.kind='identical', and now it is 'answer'"),
        ({"branches": BranchConfig(max_tokens=9)}, "branches.max_tokens=160, and now it is 9"),
        ({"shard_size": 3}, "shard_size=2, and now it is 3"),
        ({"top_k_logits": 8}, "top_k_logits=32, and now it is 8"),
    ],
)
def test_another_configuration_is_refused(
    pair: ModelPair, config: LabelingConfig, changes: dict, message: str
) -> None:
    run(replace(config, limit=2), pair)
    with pytest.raises(UsageError, match=f"was begun with {message}: finish it as it was") as error:
        run(replace(config, **changes), pair)
    assert "--overwrite" in str(error.value)
    # Where it runs, and how fast, may change; and overwriting is always possible.
    engine = EngineConfig(kv_memory="32MiB", max_batch=3)
    run(replace(config, engine=engine, device="cpu", limit=4), pair)
    run(replace(config, **changes, limit=2, overwrite=True), pair)


def test_a_run_that_came_to_nothing_binds_nobody(pair: ModelPair, config: LabelingConfig) -> None:
    short = replace(config, responses=replace(config.responses, max_tokens=2))
    store = ShardStore(config.out_dir)
    with store.lock(config):
        store.start({"format": 1, "config": short.identity()})
    assert run(replace(config, limit=2), pair) is not None
    with pytest.raises(UsageError, match=r"responses.max_tokens=160, and now it is 2"):
        run(short, pair)


def test_another_model_is_refused(
    load: Callable[[], ModelPair], pair: ModelPair, config: LabelingConfig
) -> None:
    run(replace(config, limit=2), pair)
    other = load()
    other.llm.fingerprint = replace(other.llm.fingerprint, weights_sha256="0" * 64)
    with pytest.raises(UsageError, match="was begun with llm.weights_sha256='"):
        run(config, other)
    moved = load()
    moved.llm.fingerprint = replace(moved.llm.fingerprint, name_or_path="/elsewhere")
    run(config, moved)


def test_changed_questions_are_refused(
    pair: ModelPair, config: LabelingConfig, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    row = {"id": "a", "question": "Say hats 4.\nCups are hats + 3.\nHow many cups?"}
    path.write_text(json.dumps(row))
    source = SourceConfig(kind="file", path=str(path))
    config = replace(config, source=source)
    run(config, pair)
    path.write_text(json.dumps(row | {"question": "Say hats 5.\nHow many hats?"}))
    with pytest.raises(UsageError, match="the questions of shard 0 have changed"):
        run(config, pair)


def test_two_writers_exclude_each_other(pair: ModelPair, config: LabelingConfig) -> None:
    store = ShardStore(config.out_dir)
    message = rf"is being written by process {os.getpid()}: wait for it"
    with store.lock(config):
        with pytest.raises(UsageError, match=message):
            run(config, pair)
        with pytest.raises(UsageError, match="is being written by"):
            run(replace(config, num_shards=2), pair)
    first, second = (replace(config, num_shards=2, shard_index=i) for i in (0, 1))
    with store.lock(first):
        with pytest.raises(UsageError, match=message):
            run(first, pair)
        with pytest.raises(UsageError, match="is being written by"):
            run(config, pair)
        assert run(second, pair) is None  # shards 0 and 2 are missing


def test_processes_share_the_shards(
    pair: ModelPair, config: LabelingConfig, labeled: list[int]
) -> None:
    parts = [replace(config, num_shards=2, shard_index=i) for i in (1, 0)]
    assert run(parts[0], pair) is None
    assert not (config.out_dir / "dataset").exists()
    assert run(parts[1], pair) is not None
    assert labeled == [1, 0, 2]
    alone = replace(config, out=config.out + "-alone")
    run(alone, pair)
    assert contents(alone.out_dir) == contents(config.out_dir)


def test_a_full_disk(
    pair: ModelPair, config: LabelingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # run.json, shard 0, and then no more room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        EngineError, match="shards cannot be written: No space left on device; what"
    ):
        run(config, pair)
    assert sorted(p.name for p in (config.out_dir / "shards").iterdir()) == ["00000.arrow"]
    run(config, pair)
    assert len(list((config.out_dir / "shards").iterdir())) == 3


def test_a_folder_of_somebody_else(pair: ModelPair, config: LabelingConfig, tmp_path: Path) -> None:
    config.out_dir.mkdir()
    note = config.out_dir / "thesis.tex"
    note.write_text("mine")
    with pytest.raises(UsageError, match="holds thesis.tex, but no run.json: give another --out"):
        run(config, pair)
    (config.out_dir / "run.json").write_text("{")
    with pytest.raises(DataError, match="run.json is broken"):
        run(config, pair)
    run(replace(config, overwrite=True, limit=2), pair)
    assert note.read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="out=.*cannot be written"):
        run(replace(config, out=str(file / "out")), pair)


def test_differences_are_named() -> None:
    assert find_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert find_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b=1, and now it is 2"
    assert find_difference({"a": 1}, {}) == "a=1, and now it is None"
