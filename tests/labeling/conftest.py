"""The bundled pair in float32, and small labeling runs of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from labeling.config import LabelingConfig
from labeling.run import run
from labeling.sections import BranchConfig, EngineConfig, ResponseConfig, SourceConfig
from r2r_glimp.models import ModelPair

NUM_QUESTIONS = 6
Rows = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="session")
def load() -> Callable[[], ModelPair]:
    """The pair, loaded anew: an engine changes how its models attend."""
    return lambda: ModelPair.from_config("abacus", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def pair(load: Callable[[], ModelPair]) -> ModelPair:
    """The pair that labeling runs."""
    return load()


@pytest.fixture(scope="session")
def plain_pair(load: Callable[[], ModelPair]) -> ModelPair:
    """The pair with transformers' own attention, for references."""
    return load()


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., LabelingConfig]:
    """A small run in a folder of its own; keywords replace parts of it."""

    def make(**changes: Any) -> LabelingConfig:
        values: dict[str, Any] = {
            "out": str(tmp_path / "out"),
            "source": SourceConfig(count=NUM_QUESTIONS, split="validation", levels=[2, 3]),
            "responses": ResponseConfig(max_tokens=160),
            "branches": BranchConfig(max_tokens=160),
            "engine": EngineConfig(kv_memory="64MiB", max_batch=32),
            "shard_size": 4,
        }
        return LabelingConfig(**values | changes)

    return make


@pytest.fixture
def label(pair: ModelPair, make_config: Callable[..., LabelingConfig]) -> Callable[..., Rows]:
    """Run it; its rows by response and position."""

    def do(**changes: Any) -> Rows:
        config = make_config(**changes)
        run(config, pair)
        return read(config.out_dir)

    return do


def read(out: Path) -> Rows:
    """Rows of a finished run, by response and position."""
    rows = datasets.load_from_disk(str(out / "dataset"))
    return {(row["response_id"], row["position"]): row for row in rows}
