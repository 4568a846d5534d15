"""Model runner: rows of new tokens in, hidden states and logits of the wanted rows out. One per
model.

Knows nothing about requests, routing or sampling.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from r2r_glimp.attention.backends import choose_backend
from r2r_glimp.attention.gather import GatherBackend, Row
from r2r_glimp.attention.paged import PagedContext, install, kv_bytes_per_token
from r2r_glimp.core import CheckpointError, EngineError, UsageError
from r2r_glimp.models.pair import LoadedModel
from r2r_glimp.native.library import LEVELS
from r2r_glimp.native.modules import accelerate, native_level


@dataclass(slots=True)
class Drawn:
    """What a pass of fixed shape (`engine.graphs`) has read off its rows: a token drawn from each,
    whether its logits are numbers, and its score by `router` where that is not None."""

    tokens: list[int]
    finite: list[bool]
    scores: list[float]
    router: object | None

    def pick(self, index: list[int]) -> "Drawn":
        """The given rows alone."""
        tokens, finite, scores = (
            [values[i] for i in index] for values in (self.tokens, self.finite, self.scores)
        )
        return Drawn(tokens, finite, scores, self.router)  # type: ignore[arg-type]


@dataclass(slots=True)
class Rows:
    """What a forward pass gave for the wanted rows, in batch order: R rows, H hidden size, V
    vocabulary."""

    hidden_RH: Tensor
    logits_RV: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)  # of the layers kept, [R, H] each
    drawn: Drawn | None = None  # None where the pass did not draw

    def pick(self, index: list[int]) -> "Rows":
        """The given rows alone."""
        if index == list(range(len(self.logits_RV))):
            return self
        return Rows(
            self.hidden_RH[index],
            self.logits_RV[index],
            {layer: hidden_RH[index] for layer, hidden_RH in self.layers.items()},
            None if self.drawn is None else self.drawn.pick(index),
        )


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
        self._choice = choose_backend(loaded.name, loaded.device, loaded.dtype, kernels)
        self.paths = f"{self._choice.name}, plain torch"
        if kernels != "torch" and loaded.device.type == "cpu":
            exchanged = accelerate(self.model, self.layers, self._choice.library)
            self.paths = f"{self._choice.name}, {exchanged}"
        if loaded.fingerprint.quantization is not None:
            self.paths += f", {loaded.fingerprint.quantization} weights by torchao"
        self.backend: GatherBackend | None = None
        self._hidden: Tensor | None = None
        self._layers: dict[int, Tensor] = {}  # outputs of the last pass, [1, tokens, H]
        self._device = loaded.device  # transformers looks through all weights for it
        head = self.model.get_output_embeddings()
        if head is None:
            raise EngineError(f"{loaded.name}: the model has no output embeddings")
        head.register_forward_pre_hook(self._keep_hidden)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers."""
        return kv_bytes_per_token(self.layers, self.loaded.dtype)

    def end_team(self) -> None:
        """End the threads that the kernels have beside this one: with more threads than cores all
        teams of OpenMP meet slowly (it sleeps instead of spinning)."""
        if self._choice.library is not None:
            self._choice.library.end_team()

    def allocate(self, num_blocks: int) -> None:
        """Make the model's plane of `num_blocks` KV blocks."""
        self.backend = self._choice.make(self.layers, num_blocks)

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
        with self.on_device():
            hidden_RH, logits_RV, layers = self.call(
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
                torch.tensor(kept or [0], device=device),
                self.backend.plan(rows),
            )
        num = len(kept)
        layers = {layer: states_TH[kept] for layer, states_TH in layers.items()}
        return Rows(hidden_RH[:num], logits_RV[:num], layers)

    def call(
        self, ids_T: Tensor, positions_T: Tensor, keep: Tensor | int, context: PagedContext
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """The model on one ragged batch: hidden states and logits of the tokens to keep (an index,
        or 0: all), and of the layers kept the outputs of all."""
        output = self.model(
            input_ids=ids_T.unsqueeze(0),
            position_ids=positions_T.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            paged=context,
        )
        assert self._hidden is not None
        hidden, self._hidden = self._hidden[0], None
        return hidden, output.logits[0], {n: states[0] for n, states in self._layers.items()}

    def on_device(self) -> AbstractContextManager[object]:
        """Kernels are launched on the current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def kept_layers(self) -> frozenset[int]:
        """Layers whose outputs are kept."""
        return frozenset(self._layers)

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
