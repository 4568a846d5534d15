"""What a folder holds, model or router, and whether two models make a pair. Loads no weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from r2r_glimp.attention.paged import install, kv_bytes_per_token
from r2r_glimp.cli.render import aligned, format_bytes
from r2r_glimp.core import CheckpointError
from r2r_glimp.hub.checkpoint import read_checkpoint
from r2r_glimp.models.files import check_model_folder
from r2r_glimp.models.fingerprint import hash_files
from r2r_glimp.models.loading import make_fingerprint, require_fast
from r2r_glimp.models.pair import LoadedModel
from r2r_glimp.models.placement import per_model
from r2r_glimp.models.presets import read_preset
from r2r_glimp.models.source import locate
from r2r_glimp.models.vocabulary import same_vocabulary
from r2r_glimp.routing.tags import find_tags

if TYPE_CHECKING:
    from r2r_glimp.hub.config import RouterConfig

__all__ = ["inspect_model", "inspect_pair", "inspect_router", "locate"]

Facts = dict[str, Any]


def inspect_pair(name: str) -> tuple[Facts, str]:
    """Both models of a preset, and whether they fit together.

    Raises:
        UsageError, CheckpointError: no such pair, or a model is missing or broken.
    """
    preset = read_preset(name)
    revisions = per_model("revision", preset.get("revision"), None)
    dtypes = per_model("dtype", preset.get("dtype", "auto"), "auto")
    models = []
    for role, revision, dtype in zip(("slm", "llm"), revisions, dtypes, strict=True):
        folder, commit = locate(preset[role], revision=revision)
        models.append(_outline(preset[role], folder, commit, dtype))
    slm, llm = models
    same = same_vocabulary(slm.tokenizer, llm.tokenizer)
    facts: Facts = {
        "kind": "pair",
        "name": name,
        "same_vocabulary": same,
        "granularities": ["token", "step"] if same else ["step"],
        "slm": _model_facts(slm),
        "llm": _model_facts(llm),
    }
    per_token = [facts[role]["kv_bytes_per_token"] for role in ("slm", "llm")]
    facts["kv_bytes_per_token"] = None if None in per_token else sum(per_token)
    return facts, _pair_text(facts)


def inspect_model(name: str, folder: Path, revision: str | None) -> tuple[Facts, str]:
    """A model by itself.

    Raises:
        CheckpointError: it is broken.
    """
    facts = _model_facts(_outline(name, folder, revision, "auto"))
    return {"kind": "model"} | facts, f"model {name}\n{_model_text(facts)}"


def inspect_router(name: str, folder: Path) -> tuple[Facts, str]:
    """A trained router: what it looks at, where it defers, what it was made for.

    Raises:
        CheckpointError: it is broken.
    """
    checkpoint = read_checkpoint(folder)
    num_parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    facts = {
        "kind": "router",
        "name": name,
        "num_parameters": num_parameters,
        "has_curve": checkpoint.curve is not None,
        **checkpoint.config.to_dict(),
    }
    return facts, _router_text(name, checkpoint.config, num_parameters)


def _outline(name: str, folder: Path, revision: str | None, dtype: str) -> LoadedModel:
    """A model without weights: shape on the meta device, tokenizer, fingerprint of the files."""
    weights = check_model_folder(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        config._attn_implementation = None
        wanted = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted or torch.float32)
    except Exception as error:  # transformers raises a dozen kinds of error for bad files
        raise CheckpointError(
            f"{folder} is not a causal language model: {str(error)[:300]}"
        ) from error
    tokenizer = require_fast(tokenizer, name)
    digest = hash_files(weights)
    fingerprint = make_fingerprint(
        model, tokenizer, name=name, revision=revision, weights_sha256=digest
    )
    return LoadedModel(model.eval(), tokenizer, fingerprint)


def _model_facts(outline: LoadedModel) -> Facts:
    refusal = kv_bytes = None
    try:
        layers = install(outline.model)
        kv_bytes = kv_bytes_per_token(layers, outline.dtype)
    except CheckpointError as error:
        refusal = str(error)
    except (RuntimeError, NotImplementedError):
        # Experts look at values, which an outline has not: the config tells the KV's shape.
        kv_bytes = _kv_values(outline.model.config.get_text_config()) * outline.dtype.itemsize
    return {
        "name": outline.name,
        "architecture": outline.fingerprint.architecture,
        "num_parameters": outline.num_parameters,
        "dtype": str(outline.dtype).removeprefix("torch."),
        "weight_bytes": outline.num_parameters * outline.dtype.itemsize,
        "hidden_size": outline.fingerprint.hidden_size,
        "num_layers": outline.fingerprint.num_layers,
        "vocab_size": outline.fingerprint.vocab_size,
        "num_tokens": len(outline.tokenizer),
        "context_length": outline.context_length,
        "kv_bytes_per_token": kv_bytes,
        "think_tags": find_tags(outline.tokenizer.get_vocab()) is not None,
        "chat_template": outline.tokenizer.chat_template is not None,
        "refusal": refusal,
        "fingerprint": outline.fingerprint.to_dict(),
    }


def _kv_values(config: Any) -> int:
    """Numbers in the keys and values of one token, over all layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim


def _pair_text(facts: Facts) -> str:
    words = (
        "yes: token and step granularity"
        if facts["same_vocabulary"]
        else "no: step granularity only"
    )
    per_token = facts["kv_bytes_per_token"]
    rows = [("same vocabulary", words)]
    if per_token:
        rows.append(
            (
                "KV of a token",
                f"{format_bytes(per_token)} in both models; 1 GiB holds {2**30 // per_token:,}",
            )
        )
    parts = [f"pair {facts['name']}", aligned(rows, indent=2)]
    for role in ("slm", "llm"):
        parts += [f"{role.upper()} {facts[role]['name']}", _model_text(facts[role])]
    return "\n".join(parts)


def _model_text(facts: Facts) -> str:
    kv_bytes, fingerprint = facts["kv_bytes_per_token"], facts["fingerprint"]
    weights = format_bytes(facts["weight_bytes"])
    rows = [
        ("architecture", facts["architecture"]),
        ("parameters", f"{facts['num_parameters']:,} ({weights} in {facts['dtype']})"),
        ("shape", f"{facts['num_layers']} layers, hidden size {facts['hidden_size']:,}"),
        ("vocabulary", f"{facts['num_tokens']:,} tokens, padded to {facts['vocab_size']:,}"),
        ("context", f"{facts['context_length']:,} tokens"),
        ("KV of a token", format_bytes(kv_bytes) if kv_bytes else "unknown"),
        ("thinks in tags", "yes" if facts["think_tags"] else "no"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
        ("weights", fingerprint["weights_sha256"][:16]),
        ("tokenizer", fingerprint["tokenizer_sha256"][:16]),
    ]
    if fingerprint["revision"]:
        rows.append(("revision", fingerprint["revision"]))
    if facts["refusal"]:
        rows.append(("cannot run", facts["refusal"]))
    return aligned(rows, indent=2)


def _router_text(name: str, config: "RouterConfig", num_parameters: int) -> str:
    inputs = ", ".join(f"{key} {width}" for key, width in config.model.features.widths.items())
    rows: list[tuple[str, Any]] = [
        ("kind", f"{config.router}, per {config.model.granularity}"),
        ("parameters", f"{num_parameters:,}"),
        ("looks at", inputs),
        ("trained for SLM", config.slm.name_or_path if config.slm else "not recorded"),
        ("with LLM", config.llm.name_or_path if config.llm else "not recorded"),
    ]
    rows += [(f"trained on {key}", value) for key, value in config.trained_on.items()]
    rows += [(f"test {key}", f"{value:.4f}") for key, value in config.metrics.items()]
    lines = [
        f"router {name}",
        aligned(rows, indent=2),
        "thresholds (LLM share and recall where they were measured)",
    ]
    for label, threshold in config.thresholds.items():
        default = "  default" if label == config.default_threshold else ""
        shares = (
            ("LLM share", threshold.llm_share),
            ("recall", threshold.recall),
            ("precision", threshold.precision),
        )
        told = ", ".join(f"{word} {value:.1%}" for word, value in shares if value is not None)
        lines.append(
            f"  {label:<16}  {threshold.value:.4f}  {told}  on {threshold.calibrated_on}{default}"
        )
    return "\n".join(lines)
