"""The abacus pair here, the same pair behind our own server, and a server that fails on demand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from labeling.sections import SourceConfig
from labeling.sources import load_questions
from r2r_glimp.core import Prompt
from r2r_glimp.models import ModelPair
from r2r_glimp.models.pair import LoadedModel
from tests.remote.fake import FakeServer
from tests.serve.conftest import Live, start

FLOAT32 = {"device": "cpu", "dtype": "float32"}


def load_abacus() -> ModelPair:
    return ModelPair.from_config("abacus", **FLOAT32)


@pytest.fixture(scope="session")
def local() -> ModelPair:
    """Both models here."""
    return load_abacus()


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """`r2r-glimp serve` with the abacus pair."""
    server = start(load_abacus(), max_batch=16, kv_memory="64MiB", max_tokens=512)
    yield server
    server.wait_idle()
    server.stop()


@pytest.fixture(scope="session")
def connect(local: ModelPair) -> Callable[..., ModelPair]:
    """`connect({"url": ...})`: the local SLM with an LLM behind a server."""

    def make(llm: Any, slm: Any = None) -> ModelPair:
        from r2r_glimp.models.remote import RemoteModel
        from r2r_glimp.remote.spec import RemoteSpec

        assert isinstance(local.slm, LoadedModel)
        spec = RemoteSpec.parse(llm, "llm")
        return ModelPair(slm=local.slm, llm=RemoteModel.connect(spec, local.slm.tokenizer))

    return make


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Six questions."""
    questions = load_questions(SourceConfig(count=6, split="validation", levels=[3, 4, 5]))
    return [[{"role": "user", "content": question.prompt}] for question in questions]


@pytest.fixture
def fake(local: ModelPair) -> Iterator[FakeServer]:
    """A server that writes what a test says, or fails as it says."""
    server = FakeServer(local.slm.tokenizer)
    yield server
    server.stop()
