"""Model runner: rows of new tokens in, hidden states and logits of the wanted rows out. One per
model.

Knows nothing about requests, routing or sampling.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from r2r_glimp.attention.gather import GatherBackend, Row
from r2r_glimp.attention.native import NativeBackend
from r2r_glimp.attention.paged import install, kv_bytes_per_token
from r2r_glimp.core import CheckpointError, EngineError, UsageError
from r2r_glimp.models.pair import LoadedModel
from r2r_glimp.native.library import LEVELS, SUFFIXES, Library, load_library
from r2r_glimp.native.modules import accelerate, native_level

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Rows:
    """What a forward pass gave for the wanted rows, in batch order: R rows, H hidden size, V
    vocabulary."""

    hidden_RH: Tensor
    logits_RV: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)  # of the layers kept, [R, H] each


KERNELS = ("auto", *LEVELS, "torch")


class ModelRunner:
    """Runs one model over paged KV.

    Args:
        loaded: the model; on the CPU its layers are exchanged for faster ones that compute the
            same, for good, unless `kernels` is "torch".
        kernels: "auto", the fastest there is here; "amx", "avx512" or "onednn", what multiplies
            bf16 on the CPU; or "torch", plain torch and gathered pages: the reference.

    Attributes:
        paths: what computes the linears, norms and the attention, for people.

    Raises:
        CheckpointError: the architecture does not run under paged attention.
        UsageError: no such kernels, or not on this machine.
    """

    def __init__(self, loaded: LoadedModel, kernels: str = "auto") -> None:
        if kernels not in KERNELS:
            raise UsageError(f"kernels={kernels!r} is not to be had: {', '.join(KERNELS)}")
        self.loaded = loaded
        self.model = loaded.model
        self.layers = install(self.model)
        level = native_level(self.model)
        if level and kernels not in ("auto", level):
            raise UsageError(
                f"{loaded.name} was exchanged for kernels={level!r}, for good: load it again for "
                f"kernels={kernels!r}"
            )
        self._library = None if kernels == "torch" else self._find_library(kernels)
        attention = "gathered attention" if self._library is None else "native paged attention"
        self.paths = f"{attention}, plain torch"
        if kernels != "torch" and loaded.device.type == "cpu":
            self.paths = f"{attention}, {accelerate(self.model, self.layers, self._library)}"
        self.backend: GatherBackend | None = None
        self._hidden: Tensor | None = None
        self._layers: dict[int, Tensor] = {}  # outputs of the last pass, [1, tokens, H]
        self._device = loaded.device  # transformers looks through all weights for it
        head = self.model.get_output_embeddings()
        if head is None:
            raise EngineError(f"{loaded.name}: the model has no output embeddings")
        head.register_forward_pre_hook(self._keep_hidden)

    def _find_library(self, kernels: str) -> Library | None:
        """The kernels if they can run this model; None, with a warning where they should."""
        loaded = self.loaded
        if kernels != "auto" and (loaded.device.type != "cpu" or loaded.dtype not in SUFFIXES):
            raise UsageError(
                f"kernels={kernels!r} is for bfloat16 or float32 on the CPU, and {loaded.name} is "
                f"{loaded.dtype} on {loaded.device}: take auto or torch"
            )
        if loaded.device.type != "cpu" or loaded.dtype not in SUFFIXES:
            return None
        library = load_library(kernels)
        if isinstance(library, Library):
            return library
        if kernels != "auto":
            raise UsageError(f"kernels={kernels!r} is not to be had here: {library}")
        log.warning("no native kernels, attention gathers pages and is slower: %s", library)
        return None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers."""
        return kv_bytes_per_token(self.layers, self.loaded.dtype)

    def allocate(self, num_blocks: int) -> None:
        """Make the model's plane of `num_blocks` KV blocks."""
        dtype = self.loaded.dtype
        if self._library is None:
            self.backend = GatherBackend(self.layers, num_blocks, dtype, self.loaded.device)
        else:
            self.backend = NativeBackend(self._library, self.layers, num_blocks, dtype)

    @torch.inference_mode()
    def forward(self, rows: list[Row], wanted: list[int]) -> Rows:
        """Compute the rows' new tokens and write their KV.

        Args:
            rows: new tokens with their positions and block tables.
            wanted: for each row, of how many of its last tokens hidden state and logits are wanted
                (0: none).
        """
        assert self.backend is not None, "allocate() comes first"
        tokens: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        offset = 0
        for row, num_wanted in zip(rows, wanted, strict=True):
            tokens += row.tokens
            positions += range(row.start, row.end)
            offset += len(row.tokens)
            kept += range(offset - num_wanted, offset)
        device = self._device
        output = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept or [0], device=device),
            paged=self.backend.plan(rows),
        )
        assert self._hidden is not None
        hidden, self._hidden = self._hidden[0], None
        layers = {layer: states[0, kept] for layer, states in self._layers.items()}
        return Rows(hidden[: len(kept)], output.logits[0][: len(kept)], layers)

    def keep_layer(self, layer: int) -> None:
        """Keep the output of a decoder layer with every pass, for routers that look at it.

        Args:
            layer: counted from 1.

        Raises:
            CheckpointError: the model has no such layer.
        """
        if layer in self._layers:
            return
        stack = getattr(self.model.base_model, "layers", None)
        if not isinstance(stack, nn.ModuleList) or not 1 <= layer <= len(stack):
            found = len(stack) if isinstance(stack, nn.ModuleList) else "no list of"
            raise CheckpointError(
                f"hidden_layer={layer} is wanted, but {self.loaded.name} has {found} layers"
            )

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._layers[layer] = output[0] if isinstance(output, tuple) else output

        stack[layer - 1].register_forward_hook(keep)
        self._layers[layer] = torch.empty(0)

    def _keep_hidden(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._hidden = args[0]
