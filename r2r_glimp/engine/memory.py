"""KV memory: from what a user wrote (`2GiB`, `0.85`, `auto`) to a number of blocks."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from r2r_glimp.core import UsageError
from r2r_glimp.kv.pool import BLOCK_SIZE

GPU_SHARE = 0.85  # of what the weights leave free; the rest is for activations and CUDA graphs
CPU_BYTES = 2**30
_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def plan_blocks(
    kv_memory: str | float, bytes_per_token: Mapping[torch.device, int]
) -> tuple[int, str]:
    """Blocks of both models' KV, and in words what memory that is.

    Args:
        kv_memory: bytes of both models together (`"2GiB"`, a number), a share below 1 of what is
            free on every device (`0.85`), or `"auto"`: that share of a GPU, 1 GiB of a CPU.
        bytes_per_token: of a token's KV on each device that holds some.

    Raises:
        UsageError: not a size, not even one block, or more than a GPU has free.
    """
    on_gpu = [device for device in bytes_per_token if device.type == "cuda"]
    if str(kv_memory) == "auto":
        # a model on the CPU beside one on a GPU holds as many tokens as that one
        kv_memory = GPU_SHARE if on_gpu else CPU_BYTES
        if on_gpu:
            bytes_per_token = {device: bytes_per_token[device] for device in on_gpu}
    share = _parse_share(kv_memory)
    if share is not None:
        room = {device: int(share * free_bytes(device)) for device in bytes_per_token}
        num_blocks = min(room[d] // (bytes_per_token[d] * BLOCK_SIZE) for d in room)
        _require_one(num_blocks, sum(room.values()), sum(bytes_per_token.values()))
        there = ", ".join(f"{_gib(room[d])} on {d}" for d in room)
        return num_blocks, f"{share:g} of the free memory ({there})"
    size = parse_bytes(str(kv_memory))
    num_blocks = size // (sum(bytes_per_token.values()) * BLOCK_SIZE)
    _require_one(num_blocks, size, sum(bytes_per_token.values()))
    for device in on_gpu:
        free, wanted = free_bytes(device), num_blocks * BLOCK_SIZE * bytes_per_token[device]
        if wanted > free:
            fits = free // (bytes_per_token[device] * BLOCK_SIZE) * BLOCK_SIZE
            raise UsageError(
                f"kv_memory={kv_memory} does not fit: {_gib(wanted)} of it belong on {device}, "
                f"where {_gib(free)} are free, {fits:,} tokens; use --kv_memory {GPU_SHARE:g}, "
                "which is a share of what is free"
            )
    return num_blocks, str(kv_memory)


def parse_bytes(size: str | int) -> int:
    """Bytes of `"2GiB"`, `"512MiB"` or a plain number.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(
            f"kv_memory={size!r} is not a size: write 512MiB, 2GiB, a number of bytes, a share of "
            "the free memory such as 0.85, or auto"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds for later is free too
        return torch.cuda.mem_get_info(device)[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None, "Linux says how much memory is available"
    return int(found[1]) * 1024


def _parse_share(kv_memory: str | float) -> float | None:
    """The share, if a number between 0 and 1 was given."""
    try:
        share = float(kv_memory)
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def _require_one(num_blocks: int, kv_bytes: int, bytes_per_token: int) -> None:
    if num_blocks < 1:
        raise UsageError(
            f"kv_memory of {kv_bytes:,} bytes is too small: one block of {BLOCK_SIZE} tokens "
            f"of both models takes {bytes_per_token * BLOCK_SIZE:,} bytes"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
