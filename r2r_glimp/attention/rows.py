"""A batch of rows as int32 tensors in one buffer, so that one copy brings it to a device.

    columns (float64) | ids | positions | slots | first | room | new | lengths | block tables
                        T     T           T       N       N      N     N         N x P

Packed, rows stand one behind the other and the shapes are those of the batch. Padded, each row has
`room` tokens and the shapes never change, so that a CUDA graph may read them: a token that is
padding has slot -1 (nothing is written), a row that is padding has length 0.

Shape suffixes: T tokens, N rows, P blocks of a table.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r2r_glimp.attention.gather import Row
from r2r_glimp.kv.pool import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """What attention has to know of a batch, int32 on its device."""

    slots_T: Tensor  # block * 16 + place in it, where a token's keys and values go; -1: nowhere
    first_N: Tensor  # a row's first token in the batch
    room_N: Tensor  # tokens a row takes up in the batch, padding included
    new_N: Tensor  # its new tokens
    lengths_N: Tensor  # its tokens, the new ones included; the last one's position, plus one
    tables_NP: Tensor
    max_room: int  # the largest of `room_N`


class RowBuffer:
    """The buffer of a batch: fill it on the host, then send it.

    Args:
        num_rows, num_tokens, table_width: N, T and P.
        device: where the tensors are wanted; on the CPU nothing is copied.
        num_columns: float64 numbers a row brings along.
    """

    def __init__(
        self,
        num_rows: int,
        num_tokens: int,
        table_width: int,
        device: torch.device,
        num_columns: int = 0,
    ) -> None:
        N, T, P = num_rows, num_tokens, table_width
        sizes = (2 * N * num_columns, T, T, T, N, N, N, N, N * P)
        # Parts begin at multiples of 16 bytes, or Triton would compile for every alignment.
        padded = [-(-size // 4) * 4 for size in sizes]
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(sum(padded), dtype=torch.int32, pin_memory=on_gpu)
        self.tensor = torch.empty_like(self.host, device=device) if on_gpu else self.host
        self._sent = torch.cuda.Event() if on_gpu else None
        columns, ids, positions, slots, first, room, new, lengths, tables = (
            part[:size] for part, size in zip(self.tensor.split(padded), sizes, strict=True)
        )
        self.columns_CN = columns.view(torch.float64).view(num_columns, N)
        self.ids_T, self.positions_T = ids, positions
        self._views = (slots, first, room, new, lengths, tables.view(N, P))
        parts = [
            part[:size].numpy() for part, size in zip(self.host.split(padded), sizes, strict=True)
        ]
        self._columns = parts[0].view(np.float64).reshape(num_columns, N)
        self._parts = (*parts[1:-1], parts[-1].reshape(N, P))

    def tensors(self, max_room: int) -> BatchTensors:
        """The views of the buffer that attention reads."""
        return BatchTensors(*self._views, max_room)

    def fill(
        self, rows: list[Row], room: int | None = None, columns: list[list[float]] | None = None
    ) -> None:
        """Write a batch to the host's side.

        Args:
            rows: at most as many as the buffer has; what is left over becomes padding.
            room: tokens every row takes up; None packs them.
            columns: one list per column, a number for each row.
        """
        if self._sent is not None:
            self._sent.synchronize()  # what was filled before may still be on its way
        ids, positions, slots, first, room_of, new, lengths, tables = self._parts
        ids.fill(0)
        positions.fill(0)
        slots.fill(-1)
        new.fill(0)
        lengths.fill(0)
        room_of.fill(room or 0)
        first[:] = np.arange(len(first)) * (room or 0)
        offset = 0
        for i, row in enumerate(rows):
            num_new, num_blocks = len(row.tokens), -(-row.end // BLOCK_SIZE)
            if room is None:
                first[i], room_of[i] = offset, num_new
            else:
                offset = i * room
            part = slice(offset, offset + num_new)
            offset += num_new
            blocks = np.array(row.blocks[:num_blocks], dtype=np.int32)
            where = np.arange(row.start, row.end)
            ids[part] = row.tokens
            positions[part] = where
            slots[part] = blocks[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
            new[i], lengths[i] = num_new, row.end
            tables[i, :num_blocks] = blocks
        for column, values in zip(self._columns, columns or (), strict=False):
            column[: len(values)] = values

    def send(self) -> None:
        """Bring the batch to the device."""
        if self._sent is not None:
            self.tensor.copy_(self.host, non_blocking=True)
            self._sent.record()
