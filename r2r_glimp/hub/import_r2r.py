"""Routers of the R2R project (thu-nics/R2R, `router.pt`) in our format.

Their file is a pickle of plain values; it is read with `weights_only=True`, so no code of it runs,
and checked against their layout. Their network is linear from its inputs to the first residual
block, as ours is, so it carries over exactly:

    theirs  Linear(concat[hidden, candidate, Linear(top_logits)]) ─ Linear ─ blocks
    ours    concat[Linear(hidden), Linear(top_logits), Linear(candidate)] ─ Linear ─ blocks
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2r_glimp.core import CheckpointError
from r2r_glimp.hub.checkpoint import RouterCheckpoint
from r2r_glimp.hub.config import RouterConfig
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.routing.features import FeatureSpec
from r2r_glimp.routing.mlp import MLPConfig, MLPRouterNet, MLPSize, Threshold

MODEL_TYPE = "HiddenStatesTokenLMHeadLogitsClassifier"
DEFAULTS = {
    "hidden_states_size": 1536,
    "logits_size": 100,
    "hidden_dims": [256, 512, 256],
    "expansion_factor": 4,
    "dropout_rate": 0.3,
    "pretrained_model_name": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "use_position_embedding": False,
    "max_position_embeddings": 1024,
    "topk": None,
    "normalize_input": False,
    "freeze_lm_head": False,
    "dtype": None,
}
EMBEDDING = "token_embeddings.weight"


def convert_r2r(
    path: str | os.PathLike[str], slm: Fingerprint | None = None, llm: Fingerprint | None = None
) -> RouterCheckpoint:
    """The router in one of R2R's `.pt` files.

    Args:
        path: the file without embeddings (`router.pt`); one with them is taken if they were frozen.
        slm, llm: fingerprints of the pair it is for. Their files hold only the SLM's name; without
            a fingerprint the router binds to any SLM of its width.

    Raises:
        CheckpointError: not such a file, or a kind of router that has no counterpart here.
    """
    file = Path(path)
    content = _load(file)
    args = _init_args(content, file)
    sizes = args["hidden_dims"]
    features = FeatureSpec(
        hidden_size=args["hidden_states_size"],
        top_k_logits=args["logits_size"],
        entropy=False,
        margin=False,
    )
    size = MLPSize(
        width=sizes[0],
        blocks=len(sizes),
        expansion=args["expansion_factor"],
        dropout=float(args["dropout_rate"]),
    )
    model = MLPConfig(granularity="token", features=features, size=size)
    theirs = _state_dict(content, args, model, file)
    if slm is not None and slm.hidden_size != features.hidden_size:
        raise CheckpointError(
            f"{file}: made for hidden size {features.hidden_size}, "
            f"{slm.name_or_path} has {slm.hidden_size}"
        )
    tensors = _convert(theirs, model)
    config = RouterConfig(
        model=model,
        thresholds={
            "r2r": Threshold(value=_threshold(content, file), calibrated_on="by R2R, see its file")
        },
        default_threshold="r2r",
        slm=slm,
        llm=llm,
        trained_on={"imported_from": file.name, "small_model": str(args["pretrained_model_name"])},
    )
    return RouterCheckpoint(config, tensors)


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = (
            "it holds more than weights, which could run code" if unsafe else "it is no torch file"
        )
        raise CheckpointError(f"{file}: refused: {reason}, or it is damaged") from None
    if not isinstance(content, dict) or not {"model_type", "state_dict"} <= content.keys():
        raise CheckpointError(f"{file}: not one of R2R's routers: no model_type and state_dict")
    return content


def _init_args(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Their constructor's arguments, defaults filled in."""
    if content["model_type"] != MODEL_TYPE:
        raise CheckpointError(
            f"{file}: model_type {content['model_type']!r}: only {MODEL_TYPE} is converted"
        )
    given = content.get("init_args", {})
    if not isinstance(given, dict) or given.keys() - DEFAULTS.keys():
        raise CheckpointError(f"{file}: init_args has keys that this R2R layout does not know")
    args = {**DEFAULTS, **given}
    for name in ("use_position_embedding", "normalize_input", "topk"):
        if args[name]:
            raise CheckpointError(f"{file}: {name}={args[name]!r} has no counterpart here")
    sizes = args["hidden_dims"]
    if not isinstance(sizes, list | tuple) or len(set(sizes)) != 1:
        raise CheckpointError(
            f"{file}: hidden_dims={sizes!r}: only blocks of one width are converted"
        )
    integers = [args["hidden_states_size"], args["logits_size"], args["expansion_factor"], sizes[0]]
    if any(not isinstance(n, int) or isinstance(n, bool) for n in integers):
        raise CheckpointError(f"{file}: init_args has sizes that are not integers")
    return args


def _threshold(content: Mapping[str, Any], file: Path) -> float:
    common = content.get("common_args") or {}
    value = common.get("threshold") if isinstance(common, dict) else None
    value = 0.5 if value is None else value  # what their server uses
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(f"{file}: threshold {value!r} is out of range: 0 to 1")
    return float(value)


def _state_dict(
    content: Mapping[str, Any], args: Mapping[str, Any], model: MLPConfig, file: Path
) -> dict[str, Tensor]:
    """Their tensors in float32, each of the name and shape that the arguments ask for."""
    state = content["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file}: state_dict does not hold tensors")
    if EMBEDDING in state and not args["freeze_lm_head"]:
        raise CheckpointError(
            f"{file}: holds its own token embeddings, which may have been trained: "
            "convert the file without them"
        )
    state = {name: tensor for name, tensor in state.items() if name != EMBEDDING}
    wanted = _shapes(model)
    if state.keys() != wanted.keys():
        odd = sorted(state.keys() ^ wanted.keys())
        raise CheckpointError(
            f"{file}: state_dict does not match its init_args at {', '.join(odd[:3])}"
        )
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(state[name].shape)}, wanted {shape}"
            )
        if not state[name].is_floating_point() or not torch.isfinite(state[name]).all():
            raise CheckpointError(f"{file}: {name} has NaN or infinite weights")
    return {name: tensor.float() for name, tensor in state.items()}


def _shapes(model: MLPConfig) -> dict[str, tuple[int, ...]]:
    H, K, W = model.features.hidden_size, model.features.top_k_logits, model.size.width
    wide = W * model.size.expansion
    linears = {"logits_projection": (H, K), "combined_projection": (W, 3 * H)}
    linears |= {"backbone.input_projection": (W, W), "backbone.output_layer.1": (1, W)}
    norms = ["backbone.output_layer.0"]
    for i in range(model.size.blocks):
        block = f"backbone.blocks.{i}"
        linears |= {f"{block}.mlp.0": (wide, W), f"{block}.mlp.3": (W, wide)}
        norms.append(f"{block}.layer_norm")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (W,), f"{name}.bias": (W,)}
    return shapes


def _convert(theirs: Mapping[str, Tensor], model: MLPConfig) -> dict[str, Tensor]:
    """Our tensors from theirs; products are taken in float64."""
    double = {name: tensor.double() for name, tensor in theirs.items()}
    first_hidden, first_candidate, first_logits = double["combined_projection.weight"].chunk(
        3, dim=1
    )
    merge = double["backbone.input_projection.weight"]
    none = torch.zeros(model.size.width, dtype=torch.float64)
    ours = {
        "project.hidden.weight": first_hidden,
        "project.hidden.bias": double["combined_projection.bias"],
        "project.candidate.weight": first_candidate,
        "project.candidate.bias": none,
        "project.top_logits.weight": first_logits @ double["logits_projection.weight"],
        "project.top_logits.bias": first_logits @ double["logits_projection.bias"],
        "merge.weight": torch.cat([merge] * 3, dim=1),
        "merge.bias": double["backbone.input_projection.bias"],
    }
    renamed = {"norm": "backbone.output_layer.0", "head": "backbone.output_layer.1"}
    for i in range(model.size.blocks):
        parts = {"norm": "layer_norm", "up": "mlp.0", "down": "mlp.3"}
        renamed |= {f"blocks.{i}.{a}": f"backbone.blocks.{i}.{b}" for a, b in parts.items()}
    for ours_name, name in renamed.items():
        for kind in ("weight", "bias"):
            ours[f"{ours_name}.{kind}"] = double[f"{name}.{kind}"]
    empty = MLPRouterNet(model).state_dict()
    ours |= {name: empty[name] for name in ("mean", "std")}
    assert ours.keys() == empty.keys()
    return {name: tensor.float().contiguous() for name, tensor in ours.items()}
