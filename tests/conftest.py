"""What all tests share: one thread, no network, the abacus tokenizer, tiny random models, and
Triton's interpreter where there is no GPU."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when somebody first imports Triton

from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from r2r_glimp.abacus.tokenizer import build_tokenizer
from tests.tiny import make_tiny_model

torch.set_num_threads(1)
# A shell that starts something in the background has it ignore Ctrl-C, and all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Few examples, and the same ones, unless asked for more: `--hypothesis-profile=thorough`.
settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The abacus tokenizer; do not change it."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """`tiny_model("qwen3", seed=0, num_hidden_layers=3)`: a new random model at each call."""

    def make(architecture: str = "qwen3", seed: int = 0, **sizes: Any) -> PreTrainedModel:
        return make_tiny_model(architecture, tokenizer, seed, **sizes)

    return make
