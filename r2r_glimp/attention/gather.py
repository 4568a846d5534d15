"""The gather backend: paged K/V storage of one model, and attention over it by batched matrix
products.

Plain torch, so it runs on every device and is what faster backends are checked against.

    keys[layer]   [slots, K, D]     slot = block * 16 + position in block; block 0 is all zeros and
    pads ragged rows

Rows with few new tokens (decode, short catch-up) are padded to one batch; long prefill chunks run
one at a time. The index tensors of a batch are planned once and used by every layer.

Shape suffixes: T tokens of the ragged batch, N rows, S new tokens of a row, C context of a row, Q
query heads, K key/value heads, G = Q / K, D head size.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.core import EngineError
from r2r_glimp.kv.pool import BLOCK_SIZE

SHORT_ROW = 8  # rows with at most this many new tokens share one padded batch


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one sequence: `tokens` stand at positions `start`, `start + 1`, … of the table
    `blocks`."""

    tokens: list[int]
    start: int
    blocks: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(slots=True)
class _Group:
    """Rows that attend together, padded to the longest."""

    query_NS: Tensor  # index into the ragged batch; padding repeats the row's first token
    real_NS: Tensor  # bool: not padding
    context_NC: Tensor  # slots; padding is slot 0
    query_positions_NS: Tensor
    lengths_N: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask_NSC(self, sliding_window: int | None) -> Tensor:
        """True where a query may look: causal, inside the row, inside the window."""
        if sliding_window not in self.masks:
            position_C = torch.arange(self.context_NC.shape[1], device=self.context_NC.device)
            query_NS1 = self.query_positions_NS.unsqueeze(-1)
            mask = (position_C <= query_NS1) & (position_C < self.lengths_N[:, None, None])
            if sliding_window is not None:
                mask &= position_C > query_NS1 - sliding_window
            self.masks[sliding_window] = mask
        return self.masks[sliding_window]

    def to(self, device: torch.device) -> "_Group":
        return _Group(
            self.query_NS.to(device),
            self.real_NS.to(device),
            self.context_NC.to(device),
            self.query_positions_NS.to(device),
            self.lengths_N.to(device),
        )


class GatherBackend:
    """K/V planes of one model and attention over them.

    Args:
        layers: the model's layers, as the load probe found them.
        num_blocks: usable blocks; one more, the null block, is added.
        dtype: of keys and values.
        device: where they live.

    Raises:
        EngineError: the device has too little memory.
    """

    def __init__(
        self, layers: list[LayerSpec], num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = (num_blocks + 1) * BLOCK_SIZE
        self.device = device
        try:
            self.keys = [
                torch.empty(slots, s.kv_heads, s.head_dim, dtype=dtype, device=device)
                for s in layers
            ]
            self.values = [
                torch.empty(slots, s.kv_heads, s.value_dim, dtype=dtype, device=device)
                for s in layers
            ]
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise EngineError(f"no memory for {num_blocks:,} KV blocks: lower kv_memory") from error
        for plane in self.keys + self.values:
            plane[:BLOCK_SIZE] = 0  # the null block; all others are written before they are read

    def plan(self, rows: list[Row]) -> "PlannedBatch":
        """Index tensors for a batch of rows; use it for one forward pass."""
        return PlannedBatch(self, rows)


class PlannedBatch:
    """A backend bound to one ragged batch: the `PagedContext` of a model call."""

    def __init__(self, backend: GatherBackend, rows: list[Row]) -> None:
        self.backend = backend
        offset, slots_T = 0, []
        short: list[tuple[int, Row, Tensor]] = []
        self.groups: list[_Group] = []
        for row in rows:
            context = _slots(row)
            slots_T.append(context[row.start :])
            if len(row.tokens) <= SHORT_ROW:
                short.append((offset, row, context))
            else:
                self.groups.append(_group([(offset, row, context)]).to(backend.device))
            offset += len(row.tokens)
        if short:
            self.groups.append(_group(short).to(backend.device))
        self.slots_T = torch.cat(slots_T).to(backend.device)

    def attend(
        self,
        layer: int,
        query_TQD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        spec: LayerSpec,
        sinks_Q: Tensor | None,
    ) -> Tensor:
        keys, values = self.backend.keys[layer], self.backend.values[layer]
        keys.index_copy_(0, self.slots_T, key_TKD)
        values.index_copy_(0, self.slots_T, value_TKD)
        out_TQD = query_TQD.new_empty(*query_TQD.shape[:2], spec.value_dim)
        for group in self.groups:
            out_NSQD = _attend(
                query_TQD[group.query_NS],
                keys[group.context_NC],
                values[group.context_NC],
                group.mask_NSC(spec.sliding_window),
                spec,
                sinks_Q,
            )
            out_TQD[group.query_NS[group.real_NS]] = out_NSQD[group.real_NS]
        return out_TQD


def _slots(row: Row) -> Tensor:
    """Slots of all tokens of a row up to its end, int64 [C]."""
    blocks = torch.tensor(row.blocks[: -(-row.end // BLOCK_SIZE)])
    return (blocks.unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[: row.end]


def _group(members: list[tuple[int, Row, Tensor]]) -> _Group:
    new_N = torch.tensor([len(row.tokens) for _, row, _ in members])
    first_N = torch.tensor([offset for offset, _, _ in members])
    start_N = torch.tensor([row.start for _, row, _ in members])
    within_S = torch.arange(int(new_N.max()))
    real_NS = within_S < new_N.unsqueeze(1)
    step_NS = torch.where(real_NS, within_S, 0)
    return _Group(
        query_NS=first_N.unsqueeze(1) + step_NS,
        real_NS=real_NS,
        context_NC=torch.nn.utils.rnn.pad_sequence(
            [slots for _, _, slots in members], batch_first=True
        ),
        query_positions_NS=start_N.unsqueeze(1) + step_NS,
        lengths_N=start_N + new_N,
    )


def _attend(
    query_NSQD: Tensor,
    key_NCKD: Tensor,
    value_NCKD: Tensor,
    mask_NSC: Tensor,
    spec: LayerSpec,
    sinks_Q: Tensor | None,
) -> Tensor:
    """Softmax attention with the query heads of a group packed beside the new tokens, output [N, S,
    Q, D]."""
    N, S, Q, D = query_NSQD.shape
    K = spec.kv_heads
    G = Q // K
    query = query_NSQD.view(N, S, K, G, D).permute(0, 2, 3, 1, 4).reshape(N, K, G * S, D)
    scores = (query @ key_NCKD.permute(0, 2, 3, 1)).float() * spec.scaling  # [N, K, G * S, C]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.view(N, K, G, S, -1).masked_fill(~mask_NSC[:, None, None], -torch.inf)
    if sinks_Q is not None:
        # A sink is one more column that takes probability and gives nothing (gpt-oss).
        sink = sinks_Q.float().view(1, K, G, 1, 1).expand(N, K, G, S, 1)
        probs = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    probs = probs.view(N, K, G * S, -1).to(value_NCKD.dtype)
    out = probs @ value_NCKD.permute(0, 2, 1, 3)  # [N, K, G * S, D]
    return out.view(N, K, G, S, -1).permute(0, 3, 1, 2, 4).reshape(N, S, Q, -1)
