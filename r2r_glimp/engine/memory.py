"""KV memory: from what a user wrote (`2GiB`, `0.5`) to a number of blocks."""

import re
from pathlib import Path

import torch

from r2r_glimp.core import UsageError
from r2r_glimp.kv.pool import BLOCK_SIZE

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


def parse_bytes(size: str | int) -> int:
    """Bytes of `"2GiB"`, `"512MiB"` or a plain number.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(
            f"kv_memory={size!r} is not a size: write 512MiB, 2GiB or a number of bytes"
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


def num_blocks_for(kv_bytes: int, bytes_per_token: int) -> int:
    """Blocks of both models' KV that fit.

    Raises:
        UsageError: not even one does.
    """
    num_blocks = kv_bytes // (bytes_per_token * BLOCK_SIZE)
    if num_blocks < 1:
        raise UsageError(
            f"kv_memory of {kv_bytes:,} bytes is too small: one block of {BLOCK_SIZE} tokens "
            f"of both models takes {bytes_per_token * BLOCK_SIZE:,} bytes"
        )
    return num_blocks
