"""Model runner: rows of new tokens in, hidden states and logits of the wanted rows out. One per
model.

Knows nothing about requests, routing or sampling.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2r_glimp.attention.gather import GatherBackend, Row
from r2r_glimp.attention.paged import install
from r2r_glimp.core import EngineError
from r2r_glimp.models.pair import LoadedModel


@dataclass(slots=True)
class Rows:
    """What a forward pass gave for the wanted rows, in batch order: R rows, H hidden size, V
    vocabulary."""

    hidden_RH: Tensor
    logits_RV: Tensor


class ModelRunner:
    """Runs one model over paged KV.

    Raises:
        CheckpointError: the architecture does not run under paged attention.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.layers = install(self.model)
        self.backend: GatherBackend | None = None
        self._hidden: Tensor | None = None
        head = self.model.get_output_embeddings()
        if head is None:
            raise EngineError(f"{loaded.name}: the model has no output embeddings")
        head.register_forward_pre_hook(self._keep_hidden)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers."""
        width = sum(s.kv_heads * (s.head_dim + s.value_dim) for s in self.layers)
        return width * self.loaded.dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        """Make the model's plane of `num_blocks` KV blocks."""
        self.backend = GatherBackend(self.layers, num_blocks, self.loaded.dtype, self.loaded.device)

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
        device = self.loaded.device
        output = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept or [0], device=device),
            paged=self.backend.plan(rows),
        )
        assert self._hidden is not None
        hidden, self._hidden = self._hidden[0], None
        return Rows(hidden[: len(kept)], output.logits[0][: len(kept)])

    def _keep_hidden(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._hidden = args[0]
