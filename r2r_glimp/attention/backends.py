"""Which backend a model attends by: chosen once, at construction, and named."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from r2r_glimp.attention.gather import GatherBackend
from r2r_glimp.attention.native import NativeBackend
from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.core import UsageError
from r2r_glimp.native.library import SUFFIXES, Library, load_library

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """A backend to be made once the number of blocks is known."""

    name: str  # for people
    make: Callable[[list[LayerSpec], int], GatherBackend]
    library: Library | None = None  # the CPU's kernels


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, kernels: str
) -> BackendChoice:
    """The fastest backend for a device and a dtype; the reference if `kernels` is "torch".

    Where a faster one should be had and is not, a warning says why.

    Args:
        name: of the model, for messages.
        kernels: "auto", "torch", or a level of the CPU's kernels.

    Raises:
        UsageError: a level that is not to be had here.
    """

    def gather(layers: list[LayerSpec], num_blocks: int) -> GatherBackend:
        return GatherBackend(layers, num_blocks, dtype, device)

    if kernels not in ("auto", "torch") and (device.type != "cpu" or dtype not in SUFFIXES):
        raise UsageError(
            f"kernels={kernels!r} is for bfloat16 or float32 on the CPU, and {name} is "
            f"{dtype} on {device}: take auto or torch"
        )
    if kernels != "torch":
        fast = _triton(device, dtype) if device.type == "cuda" else _native(dtype, kernels)
        if fast is not None:
            return fast
    return BackendChoice("gathered attention", gather)


def _triton(device: torch.device, dtype: torch.dtype) -> BackendChoice | None:
    if find_spec("triton") is None:
        log.warning(
            "Triton is not installed: attention gathers pages, there are no CUDA graphs, and both "
            "are slower; pip install the triton that your torch names, or kernels=torch to "
            "silence this"
        )
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        log.warning(
            "%s has compute capability %d.%d and Triton's kernels take 8.0: attention gathers "
            "pages, there are no CUDA graphs, and both are slower", device, *capability,
        )  # fmt: skip
        return None
    from r2r_glimp.attention.triton import TritonBackend, why_not
    from r2r_glimp.attention.varlen import find_varlen

    if reason := why_not(device):
        log.warning(
            "Triton does not run on %s (%s): attention gathers pages, there are no CUDA graphs, "
            "and both are slower", device, reason,
        )  # fmt: skip
        return None

    def make(layers: list[LayerSpec], num_blocks: int) -> GatherBackend:
        return TritonBackend(layers, num_blocks, dtype, device)

    by_torch = find_varlen(dtype) is not None
    return BackendChoice("Triton paged attention" + ", torch varlen for prompts" * by_torch, make)


def _native(dtype: torch.dtype, kernels: str) -> BackendChoice | None:
    if dtype not in SUFFIXES:
        return None
    library = load_library(kernels)
    if not isinstance(library, Library):
        if kernels != "auto":
            raise UsageError(f"kernels={kernels!r} is not to be had here: {library}")
        log.warning("no native kernels, attention gathers pages and is slower: %s", library)
        return None

    def make(layers: list[LayerSpec], num_blocks: int) -> GatherBackend:
        return NativeBackend(library, layers, num_blocks, dtype)

    return BackendChoice("native paged attention", make, library)
