"""The Triton backend: paged attention on a GPU, straight from the block tables.

    few new tokens (decode, catch-up, drafts)   kernel `attend`, the context split over the GPU
    long chunks of prompts                      torch's varlen attention; `attend` where that cannot
                                                (float32, softcap, sinks, a torch without it)

The planes are those of the gather backend, which is what this one is checked against. `bind` takes
tensors whose values may change under a captured CUDA graph; `plan` takes rows, once.

Shape suffixes as in `gather` and `rows`; X context of all long rows.
"""

from array import array
from contextlib import nullcontext
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2r_glimp.attention import triton_kernels as kernels
from r2r_glimp.attention.gather import GatherBackend, Row
from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.attention.rows import BatchTensors, RowBuffer
from r2r_glimp.attention.varlen import (
    LongRows,
    find_varlen,
    fits_varlen,
    flash_reads_small_pages,
)
from r2r_glimp.kv.pool import BLOCK_SIZE

LONG = 64  # new tokens from which on a row attends by torch
MAX_SPLITS = 32
MIN_PART = 256  # tokens of context that are worth a program
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

assert kernels.BLOCK.value == BLOCK_SIZE


class TritonBackend(GatherBackend):
    """K/V planes of one model on a GPU, and attention over them by kernels.

    Args:
        layers, num_blocks, dtype, device: as of the gather backend; float32, bfloat16 or float16.

    Attributes:
        varlen: torch's attention for long chunks, None where it cannot be used.
        reads_tables: whether it takes block tables of 16 tokens; else keys and values are gathered.

    Raises:
        EngineError: the device has too little memory.
    """

    def __init__(
        self, layers: list[LayerSpec], num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers, num_blocks, dtype, device)
        on_gpu = device.type == "cuda"
        self.num_processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4
        )
        # Triton's interpreter takes bf16 for integers in a product.
        self.dot = _DTYPES[dtype if on_gpu else torch.float32]
        self.varlen = find_varlen(dtype) if on_gpu else None
        self.reads_tables = on_gpu and flash_reads_small_pages()

    def plan(self, rows: list[Row]) -> "TritonBatch":  # type: ignore[override]
        """Tensors for a batch of rows; use it for one forward pass."""
        num_tokens = sum(len(row.tokens) for row in rows)
        table_width = max(-(-row.end // BLOCK_SIZE) for row in rows)
        buffer = RowBuffer(len(rows), num_tokens, table_width, self.device)
        buffer.fill(rows)
        buffer.send()
        tensors = buffer.tensors(max(len(row.tokens) for row in rows))
        long = [i for i, row in enumerate(rows) if len(row.tokens) >= LONG]
        if self.varlen is None or not long:
            return TritonBatch(self, tensors, tensors, None)
        return TritonBatch(
            self, tensors, _short(tensors, rows), LongRows.plan(rows, long, self.device)
        )

    def store(
        self, layer: int, key_TKD: Tensor, value_TKD: Tensor, slots_T: Tensor, spec: LayerSpec
    ) -> None:
        """Write new keys and values into their slots."""
        keys, values = self.keys[layer], self.values[layer]
        kernels.store[(len(slots_T),)](
            key_TKD, value_TKD, keys, values, slots_T,
            *key_TKD.stride()[:2], *value_TKD.stride()[:2],
            keys.shape[1], spec.kv_heads, spec.head_dim, spec.value_dim,
            HEADS=triton.next_power_of_2(spec.kv_heads),
            HEAD_DIM=triton.next_power_of_2(spec.head_dim),
            VALUE_DIM=triton.next_power_of_2(spec.value_dim),
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        query_TQD: Tensor,
        out_TQD: Tensor,
        rows: BatchTensors,
        spec: LayerSpec,
        sinks_Q: Tensor | None,
    ) -> None:
        """Attend for the given rows; what `out` holds for other tokens afterwards means nothing."""
        keys, values = self.keys[layer], self.values[layer]
        num_tokens, num_heads = query_TQD.shape[:2]
        num_rows, table_width = rows.tables_NP.shape
        group = num_heads // spec.kv_heads
        # a product of tensor cores has 16 rows at least
        head_dim, value_dim = (
            max(16, triton.next_power_of_2(d)) for d in (spec.head_dim, spec.value_dim)
        )
        step = 64 if head_dim <= 128 and keys.dtype.itemsize == 2 else 32  # fits shared memory
        tile = min(step, max(16, triton.next_power_of_2(rows.max_room * group)))
        tiles = triton.cdiv(rows.max_room * group, tile)
        splits = self.num_splits(tiles * num_rows * spec.kv_heads, table_width * BLOCK_SIZE)
        to, lse = out_TQD, query_TQD
        if splits > 1:
            to = torch.empty((splits, *out_TQD.shape), dtype=torch.float32, device=self.device)
            lse = torch.empty(to.shape[:3], dtype=torch.float32, device=self.device)
        kernels.attend[(tiles, num_rows, spec.kv_heads * splits)](
            query_TQD, keys, values, to, lse, query_TQD if sinks_Q is None else sinks_Q,
            rows.first_N, rows.room_N, rows.new_N, rows.lengths_N, rows.tables_NP,
            spec.scaling, spec.softcap or 0.0, spec.sliding_window or 0,
            *query_TQD.stride()[:2],
            num_tokens, num_heads, keys.shape[1], table_width,
            group, spec.head_dim, spec.value_dim,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            TILE=tile,
            STEP=step,
            SPLITS=splits,
            HAS_WINDOW=spec.sliding_window is not None,
            HAS_SOFTCAP=spec.softcap is not None,
            HAS_SINKS=sinks_Q is not None,
            DOT=self.dot,
            PRECISION="ieee",  # float32 means float32, not tf32
        )  # fmt: skip
        if splits > 1:
            kernels.combine[(num_tokens * num_heads,)](
                to, lse, out_TQD, num_tokens * num_heads, spec.value_dim,
                VALUE_DIM=value_dim, SPLITS=splits,
            )  # fmt: skip

    def num_splits(self, num_programs: int, max_context: int) -> int:
        """Parts of the context, a power of two: enough programs for two on every multiprocessor,
        and no part shorter than is worth a program."""
        wanted = min(2 * self.num_processors // num_programs, max_context // MIN_PART, MAX_SPLITS)
        return 1 << max(0, wanted.bit_length() - 1)

    def bind(self, tensors: BatchTensors) -> "TritonBatch":
        """Attention under tensors that stay where they are while their values change."""
        return TritonBatch(self, tensors, tensors, None)


class TritonBatch:
    """The backend bound to one batch: the `PagedContext` of a model call.

    Args:
        tensors: all rows.
        short: those that attend by the kernel where a layer's long ones attend by torch.
        long: the long ones; None where all attend by the kernel.
    """

    def __init__(
        self,
        backend: TritonBackend,
        tensors: BatchTensors,
        short: BatchTensors | None,
        long: "LongRows | None",
    ) -> None:
        self.backend = backend
        self.tensors, self.short, self.long = tensors, short, long

    def attend(
        self,
        layer: int,
        query_TQD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        spec: LayerSpec,
        sinks_Q: Tensor | None,
    ) -> Tensor:
        backend = self.backend
        query_TQD, key_TKD, value_TKD = map(_dense, (query_TQD, key_TKD, value_TKD))
        backend.store(layer, key_TKD, value_TKD, self.tensors.slots_T, spec)
        out_TQD = query_TQD.new_empty(*query_TQD.shape[:2], spec.value_dim)
        if self.long is None or not fits_varlen(spec):
            backend.attend(layer, query_TQD, out_TQD, self.tensors, spec, sinks_Q)
            return out_TQD
        if self.short is not None:
            backend.attend(layer, query_TQD, out_TQD, self.short, spec, sinks_Q)
        assert backend.varlen is not None
        planes = backend.keys[layer], backend.values[layer]
        self.long.attend(backend.varlen, backend.reads_tables, *planes, query_TQD, out_TQD, spec)
        return out_TQD


def _short(tensors: BatchTensors, rows: list[Row]) -> BatchTensors | None:
    """The rows that are not long; None if all are."""
    short = [i for i, row in enumerate(rows) if len(row.tokens) < LONG]
    if not short:
        return None
    index = torch.tensor(short, device=tensors.slots_T.device)
    return replace(
        tensors,
        first_N=tensors.first_N[index],
        room_N=tensors.room_N[index],
        new_N=tensors.new_N[index],
        lengths_N=tensors.lengths_N[index],
        tables_NP=tensors.tables_NP[index],
        max_room=max(len(rows[i].tokens) for i in short),
    )


def why_not(device: torch.device) -> str | None:
    """Why kernels do not run on a device; None if they do. Triton needs a C compiler and Python's
    headers to launch its first one."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            spec = LayerSpec(1, 16, 16, 1.0, None, None, False)
            x = torch.ones(1, 1, 16, device=device)
            backend = TritonBackend([spec], 1, torch.float32, device)
            out = backend.plan([Row([0], 0, array("i", [1]))]).attend(0, x, x, x, spec, None)
            return None if torch.equal(out, x) else "a kernel gave a wrong result"
    except Exception as error:  # whatever a compiler, a driver or a linker raises
        return (str(error) or type(error).__name__).splitlines()[0]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
