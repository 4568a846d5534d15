"""Where a model goes (device), in which numbers (dtype), and one value that speaks for both."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from r2r_glimp.core import UsageError

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def per_model(name: str, value: Any, default: Any) -> tuple[Any, Any]:
    """What an argument says of the SLM and of the LLM.

    One value speaks for both, `{"slm": ..., "llm": ...}` or a pair for each. A key left out is the
    default.

    Raises:
        UsageError: a mapping has other keys, or a sequence is no pair.
    """
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in ("slm", "llm")]:
            raise UsageError(f"{name} has the unknown key {unknown[0]!r}: it takes slm and llm")
        return value.get("slm", default), value.get("llm", default)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise UsageError(f"{name} has {len(value)} values: give one, or one for each model")
        return value[0], value[1]
    return value, value


SPLIT = "tp"  # the LLM's device: all that torchrun gives


def split_processes() -> int:
    """Processes to split a model over: as many as torchrun started.

    Raises:
        UsageError: torchrun started none, or there are fewer GPUs.
    """
    count, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count < 2:
        raise UsageError(
            f"device={SPLIT!r} splits the LLM over processes: start them by "
            "torchrun --nproc_per_node N -m r2r_glimp ..."
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < local:
        raise UsageError(
            f"torchrun started {local} processes here, but there are "
            f"{torch.cuda.device_count()} GPUs: one for each"
        )
    return count


def process_device() -> torch.device:
    """The device of this process of torchrun."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """The dtype of a name; "auto" (what the checkpoint says) stays as it is.

    Raises:
        UsageError: another name.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype={name!r} is not to be had: {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    if str(device) == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"device={str(device)!r} is not to be had: auto, cpu, cuda or cuda:N")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"device={str(device)!r} was asked for, but torch sees no GPU: use cpu or auto"
        )
    index, count = resolved.index or 0, torch.cuda.device_count()
    if index >= count:
        raise UsageError(
            f"device={str(device)!r} was asked for, but there are {count} GPUs (cuda:0 on)"
        )
    return torch.device("cuda", index)


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UsageError if a device cannot compute in these numbers."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise UsageError(
            f"bfloat16 is not to be had on {device} ({torch.cuda.get_device_name(device)}, compute "
            f"capability {capability[0]}.{capability[1]}, it takes 8.0): use --dtype float16 or "
            "float32"
        )
