"""Tiny checkpoints on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def checkpoint(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    tiny_model: Callable[..., PreTrainedModel],
) -> Callable[..., Path]:
    """`checkpoint("name", "llama", seed=1)`: the folder of a saved random model and tokenizer."""

    def save(
        name: str = "model",
        architecture: str = "qwen3",
        seed: int = 0,
        max_shard_size: str = "1GB",
        **sizes: Any,
    ) -> Path:
        folder = tmp_path / name
        model = tiny_model(architecture, seed, **sizes)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return save
