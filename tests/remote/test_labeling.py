"""Labeling with the LLM behind a server: the same labels; the SLM's hidden states are made here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from labeling.config import LabelingConfig
from labeling.run import run
from labeling.sections import (
    BranchConfig,
    EngineConfig,
    ResponseConfig,
    SourceConfig,
    Until,
    VerifierConfig,
)
from r2r_glimp.models import ModelPair
from tests.labeling.conftest import read
from tests.serve.conftest import Live


@pytest.mark.parametrize(("kind", "until"), [("answer", "answer"), ("identical", "sentence")])
def test_the_same_labels(
    kind: str,
    until: Until,
    connect: Callable[..., ModelPair],
    local: ModelPair,
    live: Live,
    tmp_path: Path,
) -> None:
    rows = []
    for name, pair in (("here", local), ("there", connect(f"{live.url}/v1#pair:llm"))):
        config = LabelingConfig(
            out=str(tmp_path / name),
            source=SourceConfig(count=4, split="validation", levels=[2, 3]),
            responses=ResponseConfig(max_tokens=160),
            branches=BranchConfig(until=until, max_tokens=160),
            verifier=VerifierConfig(kind=kind),  # type: ignore[arg-type]
            engine=EngineConfig(kv_memory="64MiB", max_batch=8),
        )
        assert run(config, pair) is not None
        rows.append(read(config.out_dir))
    here, there = rows
    assert here.keys() == there.keys() and len(here) > 100
    for key, row in here.items():
        for column in ("token", "label", "step_label", "phase"):
            assert row[column] == there[key][column], (key, column)
