"""The gather backend: paged K/V storage of one model, and attention over it by batched matrix
products.

Plain torch, so it runs on every device and is what faster backends are checked against.

    keys[layer]   [K, slots, D]     slot = block * 16 + position in block; block 0 is all zeros and
    pads ragged rows

Rows with about as many new tokens are padded to one batch: decode, short catch-up, drafts; long
prefill chunks run one at a time. The index tensors of a batch are planned once and used by every
layer. Pages are gathered by whole rows (`index_select` copies them; fancy indexing would walk the
numbers one by one), with the heads outermost, so that what is gathered is what is multiplied.

Shape suffixes: T tokens of the ragged batch, N rows, S new tokens of a row, C context of a row, Q
query heads, K key/value heads, G = Q / K, D head size, R = N * S, X = N * C.
"""

from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor

from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.core import EngineError
from r2r_glimp.kv.pool import BLOCK_SIZE

SIZES = (1, 4, 16, 64)  # rows with at most so many new tokens, and more than the size before,
MAX_SCORES = 2**22  # share a padded batch of at most so many scores per head


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one sequence: `tokens` stand at positions `start`, `start + 1`, … of the table
    `blocks` (int32, at least as long as the row needs)."""

    tokens: list[int]
    start: int
    blocks: "array[int]"

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
    query_R: Tensor = field(init=False)
    context_X: Tensor = field(init=False)
    picked: Tensor = field(init=False)  # index of what is not padding among R
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.query_R, self.context_X = self.query_NS.flatten(), self.context_NC.flatten()
        self.picked = self.real_NS.flatten().nonzero().squeeze(1)

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
        self.device, self.dtype = device, dtype
        try:
            self.keys = self._empty([(s.kv_heads, slots, s.head_dim) for s in layers])
            self.values = self._empty([(s.kv_heads, slots, s.value_dim) for s in layers])
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise EngineError(f"no memory for {num_blocks:,} KV blocks: lower kv_memory") from error
        for plane in self.keys + self.values:
            plane[:, :BLOCK_SIZE] = 0  # the null block; all others are written before they are read

    def _empty(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Memory for planes, not yet written."""
        return [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]

    def plan(self, rows: list[Row]) -> "PlannedBatch":
        """Index tensors for a batch of rows; use it for one forward pass."""
        return PlannedBatch(self, rows)


class PlannedBatch:
    """A backend bound to one ragged batch: the `PagedContext` of a model call."""

    def __init__(self, backend: GatherBackend, rows: list[Row]) -> None:
        self.backend = backend
        offset, slots_T = 0, []
        members: list[_Member] = []
        for row in rows:
            context = row_slots(row)
            slots_T.append(context[row.start :])
            members.append((offset, row, context))
            offset += len(row.tokens)
        self.groups = [_group(group).to(backend.device) for group in _split(members)]
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
        keys.index_copy_(1, self.slots_T, key_TKD.transpose(0, 1))
        values.index_copy_(1, self.slots_T, value_TKD.transpose(0, 1))
        out_TQD = query_TQD.new_empty(*query_TQD.shape[:2], spec.value_dim)
        for group in self.groups:
            out_RQD = _attend(
                query_TQD.index_select(0, group.query_R),
                keys.index_select(1, group.context_X),
                values.index_select(1, group.context_X),
                group.mask_NSC(spec.sliding_window),
                spec,
                sinks_Q,
            )
            real = group.picked
            out_TQD.index_copy_(0, group.query_R[real], out_RQD.index_select(0, real))
        return out_TQD


_Member = tuple[int, Row, Tensor]  # first token in the ragged batch, row, slots of its context


def _split(members: list[_Member]) -> list[list[_Member]]:
    """Rows that are padded to one batch each; a row longer than all sizes stands alone."""
    by_size: dict[int, list[_Member]] = {}
    groups = []
    for member in members:
        num_new = len(member[1].tokens)
        size = next((size for size in SIZES if num_new <= size), None)
        if size is None:
            groups.append([member])
        else:
            by_size.setdefault(size, []).append(member)
    for size, same in by_size.items():
        longest = max(len(context) for _, _, context in same)
        step = max(1, MAX_SCORES // (size * longest))
        groups += [same[i : i + step] for i in range(0, len(same), step)]
    return groups


def row_slots(row: Row) -> Tensor:
    """Slots of all tokens of a row up to its end, int64 [C]."""
    blocks = torch.tensor(row.blocks[: -(-row.end // BLOCK_SIZE)], dtype=torch.long)
    return (blocks.unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[: row.end]


def _group(members: list[_Member]) -> _Group:
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
    query_RQD: Tensor,
    key_KXD: Tensor,
    value_KXD: Tensor,
    mask_NSC: Tensor,
    spec: LayerSpec,
    sinks_Q: Tensor | None,
) -> Tensor:
    """Softmax attention with the query heads of a group packed beside the new tokens, output [R, Q,
    D]."""
    N, S, C = mask_NSC.shape
    R, Q, D = query_RQD.shape
    K = spec.kv_heads
    G = Q // K
    query = query_RQD.view(N, S, K, G, D).permute(2, 0, 3, 1, 4).reshape(K * N, G * S, D)
    scores = torch.bmm(query, key_KXD.view(K * N, C, D).transpose(1, 2)).float() * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.view(K, N, G, S, C).masked_fill_(~mask_NSC[:, None], -torch.inf)
    if sinks_Q is not None:
        # A sink is one more column that takes probability and gives nothing (gpt-oss).
        sink = sinks_Q.float().view(K, 1, G, 1, 1).expand(K, N, G, S, 1)
        probs = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    probs = probs.reshape(K * N, G * S, C).to(value_KXD.dtype)
    out = torch.bmm(probs, value_KXD.view(K * N, C, -1))
    return out.view(K, N, G, S, -1).permute(1, 3, 0, 2, 4).reshape(R, Q, -1)
