"""Long chunks of prompts by torch's varlen attention, over the planes of the gather backend.

Shape suffixes as in `gather` and `rows`; L tokens and X context of all long rows.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2r_glimp.attention.gather import Row, row_slots
from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.kv.pool import BLOCK_SIZE


def find_varlen(dtype: torch.dtype) -> Callable[..., Any] | None:
    """torch's varlen attention, if this torch has the one that takes a scale and a window; it knows
    half precision alone."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= names.keys() else None


def flash_reads_small_pages() -> bool:
    """Whether torch's flash attention takes pages of 16 tokens: that of its wheels (FA2) wants
    pages of 256, FA3 takes any, once somebody activated it."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current is not None and current() == "FA3"


def fits_varlen(spec: LayerSpec) -> bool:
    """Whether it computes what a layer asks for."""
    return (
        spec.softcap is None
        and not spec.has_sinks
        and spec.head_dim == spec.value_dim
        and spec.head_dim <= 256
        and spec.head_dim % 8 == 0
    )


@dataclass(frozen=True, slots=True)
class LongRows:
    """Rows that attend by torch: its varlen attention wants queries, and keys where it reads no
    block tables, one row behind the other."""

    tokens_L: Tensor  # their tokens in the batch
    cu_queries: Tensor  # int32 [rows + 1], where each row's queries begin
    cu_keys: Tensor
    slots_X: Tensor
    lengths_N: Tensor
    tables_NP: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def plan(cls, rows: list[Row], long: list[int], device: torch.device) -> "LongRows":
        ends = np.cumsum([len(row.tokens) for row in rows])
        chosen = [rows[i] for i in long]
        new, lengths = [len(row.tokens) for row in chosen], [row.end for row in chosen]
        tables = [torch.tensor(r.blocks[: -(-r.end // BLOCK_SIZE)]).int() for r in chosen]
        on_device = partial(torch.tensor, dtype=torch.int32, device=device)
        return cls(
            tokens_L=torch.cat(
                [torch.arange(ends[i] - n, ends[i]) for i, n in zip(long, new, strict=True)]
            ).to(device),
            cu_queries=on_device(np.cumsum([0, *new])),
            cu_keys=on_device(np.cumsum([0, *lengths])),
            slots_X=torch.cat([row_slots(row) for row in chosen]).to(device),
            lengths_N=on_device(lengths),
            tables_NP=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(device),
            max_queries=max(new),
            max_keys=max(lengths),
        )

    def attend(
        self,
        varlen: Callable[..., Any],
        reads_tables: bool,
        keys: Tensor,
        values: Tensor,
        query_TQD: Tensor,
        out_TQD: Tensor,
        spec: LayerSpec,
    ) -> None:
        """Attend over the planes of a layer, into the rows' places of `out`."""
        options: dict[str, Any] = {}
        if reads_tables:
            keys, values = (
                x.unflatten(1, (-1, BLOCK_SIZE)).permute(1, 2, 0, 3) for x in (keys, values)
            )
            options = {"seqused_k": self.lengths_N, "block_table": self.tables_NP}
        else:
            keys, values = (x.index_select(1, self.slots_X).transpose(0, 1) for x in (keys, values))
        window = spec.sliding_window
        out_LQD = varlen(
            query_TQD.index_select(0, self.tokens_L),
            keys,
            values,
            self.cu_queries,
            None if reads_tables else self.cu_keys,
            self.max_queries,
            self.max_keys,
            scale=spec.scaling,
            # keys to the left of a query's own; the last query stands at the last key
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query_TQD.shape[1] != spec.kv_heads,
            **options,
        )
        out_TQD.index_copy_(0, self.tokens_L, out_LQD)
