"""Weight-only quantisation by torchao: a model's linear layers in 8 or 4 bits, all but its head.

What is computed stays in the model's dtype; the SLM's hidden states, which routers read, are never
touched. Made at load, from the checkpoint's own weights.
"""

import logging
from importlib.util import find_spec

import torch
from transformers import TorchAoConfig

from r2r_glimp.core import UsageError

BITS = ("int8", "int4")
_GROUP = 128  # weights of a row that share a scale, of int4

logger = logging.getLogger(__name__)


def check_quantization(bits: str, device: torch.device) -> None:
    """Raises UsageError if a device cannot compute with such weights, or torchao is missing."""
    if bits not in BITS:
        raise UsageError(f"llm_quantization={bits!r} is not to be had: {', '.join(BITS)}")
    if find_spec("torchao") is None:
        raise UsageError(
            f"llm_quantization={bits!r} needs torchao: pip install 'r2r_glimp[quantize]'"
        )
    if device.type == "cpu" and bits == "int4":
        raise UsageError(
            "llm_quantization='int4' needs a GPU: on the CPU take int8, or none, which is faster"
        )
    if device.type == "cpu":
        logger.warning(
            "llm_quantization='int8' halves the LLM's memory, but makes it slower on a CPU: the "
            "bfloat16 kernels are three times as fast"
        )


def quantization_config(bits: str) -> TorchAoConfig:
    """What transformers is to make of the weights as it loads them."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig  # takes a second

    if bits == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(
        Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")
    )
