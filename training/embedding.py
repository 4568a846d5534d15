"""The SLM's input embedding, read from its files without loading the model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2r_glimp.core import CheckpointError
from r2r_glimp.models.files import check_model_folder
from r2r_glimp.models.fingerprint import Fingerprint, hash_files
from r2r_glimp.models.source import locate


def load_input_embedding(name: str, fingerprint: Fingerprint | None) -> Tensor:
    """Rows of the input embedding, bfloat16 [V, H].

    Args:
        name: folder or Hub id of the model.
        fingerprint: what it must be; None takes it as it is. With adapters the whole model is
            loaded and merged, since an adapter may change the embedding.

    Raises:
        CheckpointError: the model is not there, broken, or another one.
    """
    if fingerprint is not None and fingerprint.adapters:
        return _of_merged_model(name, fingerprint)
    folder, _ = locate(name, revision=_revision(name, fingerprint))
    weights = check_model_folder(folder)
    if fingerprint is not None and hash_files(weights) != fingerprint.weights_sha256:
        raise CheckpointError(
            f"{name} is not the SLM the dataset was made with: its weights differ from "
            f"{fingerprint.name_or_path}'s; give the right folder as data.slm"
        )
    return _read(folder, weights)


def _read(folder: Path, weights: list[Path]) -> Tensor:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    embedding = model.get_input_embeddings().weight
    names = {
        key for key, value in model.named_parameters(remove_duplicate=False) if value is embedding
    }
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for key in names & set(tensors.keys()):
                return tensors.get_tensor(key).bfloat16()
    raise CheckpointError(f"{folder} has no input embedding ({' or '.join(sorted(names))})")


def _of_merged_model(name: str, fingerprint: Fingerprint) -> Tensor:
    from r2r_glimp.models.loading import load_model

    model, _, found = load_model(
        name,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        revision=_revision(name, fingerprint),
        adapters=fingerprint.adapters,
    )
    mismatch = fingerprint.mismatch(found)
    if mismatch is not None:
        raise CheckpointError(f"{name} is not the SLM the dataset was made with: {mismatch}")
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.detach().bfloat16()


def _revision(name: str, fingerprint: Fingerprint | None) -> str | None:
    return (
        fingerprint.revision
        if fingerprint is not None and fingerprint.name_or_path == name
        else None
    )
