"""One model from a folder or Hub id: files checked, every weight accounted for, adapters merged."""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from r2r_glimp.core import CheckpointError, EngineError
from r2r_glimp.models.adapters import check_adapter, merge_adapter
from r2r_glimp.models.files import check_model_folder
from r2r_glimp.models.fingerprint import Fingerprint, hash_files, hash_values
from r2r_glimp.models.placement import check_dtype
from r2r_glimp.models.quantization import check_quantization, quantization_config
from r2r_glimp.models.source import locate, one_line
from r2r_glimp.models.vocabulary import tokenizer_sha256

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tekken.json"),
)

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    revision: str | None = None,
    adapters: Sequence[str] = (),
    trust_remote_code: bool = False,
    num_processes: int = 1,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Fingerprint]:
    """A causal language model, its tokenizer and its fingerprint.

    Args:
        name: a folder or a Hub id.
        device: where it goes.
        dtype: of its weights; "auto" is what the checkpoint says.
        revision: branch, tag or commit of a Hub repository.
        adapters: LoRA adapters (folders or Hub ids), merged in this order.
        trust_remote_code: run Python code that comes with the model.
        num_processes: split it over so many, of which this is one (tensor parallel).
        quantization: int8 or int4 weights, made by torchao; see `quantization`.

    Raises:
        UsageError: an argument makes no sense, or a package is not installed.
        CheckpointError: the files are missing, broken, unsafe, or not a causal language model.
        EngineError: the device has too little memory.
    """
    folder, commit = locate(name, revision=revision, with_code=trust_remote_code)
    weights = check_model_folder(folder)
    adapter_folders = [locate(adapter)[0] for adapter in adapters]
    for adapter_folder in adapter_folders:
        check_adapter(adapter_folder)
    config = _load_config(folder, trust_remote_code)
    said = getattr(config.get_text_config(), "dtype", None) if dtype == "auto" else dtype
    if isinstance(said, torch.dtype):
        check_dtype(device, said)
    quantized: dict[str, Any] = {}
    if quantization is not None:
        check_quantization(quantization, device)
        quantized = {"quantization_config": quantization_config(quantization)}
    tokenizer = _load_tokenizer(folder, config, trust_remote_code)
    model = _load_weights(
        folder, config, device, dtype, trust_remote_code, num_processes, quantized
    )
    for adapter_folder in adapter_folders:
        model = merge_adapter(model, adapter_folder)
    digest = hash_files(weights)
    for adapter_folder in adapter_folders:
        digest += hash_files([adapter_folder / "adapter_model.safetensors"])
        digest = hashlib.sha256(digest.encode()).hexdigest()
    fingerprint = make_fingerprint(
        model,
        tokenizer,
        name=name,
        revision=commit,
        adapters=adapters,
        weights_sha256=digest,
        quantization=quantization,
    )
    logger.info("loaded %s: %s, %s on %s", name, fingerprint.architecture, model.dtype, device)
    return model, tokenizer, fingerprint


def load_tokenizer(name: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or Hub id alone, whose weights are elsewhere.

    Raises:
        CheckpointError: it is missing or broken, or a slow one.
    """
    folder, _ = locate(name, only_tokenizer=True)
    return _load_tokenizer(folder, None, trust_remote_code=False)


def require_fast(tokenizer: Any, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer itself; raises CheckpointError if it is a slow one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{name} has the slow tokenizer {type(tokenizer).__name__}: "
            "one with a tokenizer.json is needed"
        )
    return tokenizer


def make_fingerprint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    name: str,
    revision: str | None = None,
    adapters: Sequence[str] = (),
    weights_sha256: str | None = None,
    quantization: str | None = None,
) -> Fingerprint:
    """What a model is. Without `weights_sha256`, it is taken of the values in memory."""
    config = model.config.get_text_config()
    return Fingerprint(
        name_or_path=name,
        revision=revision,
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0],
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        weights_sha256=weights_sha256 or hash_values(model),
        adapters=tuple(adapters),
        quantization=quantization,
    )


def _load_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    with _one_line(f"{folder / 'config.json'} cannot be used"), quiet():
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
    # which code computes the attention is ours to say, never a checkpoint's
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def _load_tokenizer(
    folder: Path, config: PreTrainedConfig | None, trust_remote_code: bool
) -> PreTrainedTokenizerFast:
    with _one_line(f"the tokenizer of {folder} cannot be loaded"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder),
            config=config,
            trust_remote_code=trust_remote_code,
            local_files_only=not trust_remote_code,
        )
    tokenizer = require_fast(tokenizer, str(folder))
    # without a vocabulary transformers makes an empty tokenizer rather than none
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise CheckpointError(f"{folder} has no tokenizer: a tokenizer.json is needed")
    return tokenizer


def _load_weights(
    folder: Path,
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    num_processes: int,
    quantized: dict[str, Any],
) -> PreTrainedModel:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise CheckpointError(f"{folder} is a {config.model_type} model, no causal language model")
    # straight to the GPU where accelerate allows it: a large model may not fit the host's memory
    placed = device.type != "cpu" and is_accelerate_available()
    placement: dict[str, Any] = {"device_map": {"": device} if placed else None}
    if num_processes > 1:  # each takes its part to its device
        placement = {"distributed_config": DistributedConfig(tp_size=num_processes)}
    with _one_line(f"{folder} cannot be loaded (transformers {version('transformers')})"), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            **placement,
            **quantized,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, with their names
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=not trust_remote_code,
        )
        model, report = loaded
        _refuse_guesses(report, folder, type(model).__name__)
        if num_processes == 1:
            model = model.to(device)
        return model.eval().requires_grad_(False)


def _refuse_guesses(report: dict[str, Any], folder: Path, architecture: str) -> None:
    """Raises CheckpointError if a weight is not from the files: transformers draws it at random."""
    for name, found, wanted in sorted(report["mismatched_keys"], key=str):
        raise CheckpointError(
            f"{folder} does not fit its config: {name} is {list(found)}, "
            f"{architecture} wants {list(wanted)}"
        )
    for key, words in (
        ("missing_keys", "lacks weights of"),
        ("unexpected_keys", "has weights unknown to"),
    ):
        if names := sorted(report[key]):
            listed = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise CheckpointError(f"{folder} {words} {architecture}: {len(names)} ({listed})")
    if report["error_msgs"]:
        raise CheckpointError(f"{folder} cannot be loaded: {report['error_msgs'][0]}")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line; transformers raises a dozen kinds of error."""
    try:
        yield
    except (CheckpointError, EngineError):
        raise
    except torch.OutOfMemoryError as error:
        raise EngineError(f"{what}: out of memory: {one_line(error)}") from error
    except Exception as error:
        reason = one_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own; read it, then allow it by trust_remote_code"
        raise CheckpointError(f"{what}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' reports off the screen (ours are one line), and its bars out of logs."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
