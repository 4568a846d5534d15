"""The native backend: attention on the CPU straight from the block tables, nothing is gathered.

One call of a compiled kernel per layer writes the new keys and values and attends over the blocks
where they lie, threads sharing rows and key/value heads. Rows with many new tokens (prompts) are
written by it and attend by torch's fused attention, which multiplies long chunks faster. The planes
are those of the gather backend, which is what this one is checked against.
"""

import ctypes
import math
from array import array
from ctypes import c_void_p

import torch
from torch import Tensor

from r2r_glimp.attention.gather import GatherBackend, Row, row_slots
from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.native.library import BatchStruct, LayerStruct, Library, Strided

LONG = 64  # new tokens from which on a row attends by torch


class NativeBackend(GatherBackend):
    """K/V planes of one model on the CPU, and attention over them by the kernels.

    Args:
        library: the kernels.
        layers, num_blocks, dtype: as of the gather backend; float32 or bfloat16.

    Raises:
        EngineError: the machine has too little memory.
    """

    def __init__(
        self, library: Library, layers: list[LayerSpec], num_blocks: int, dtype: torch.dtype
    ) -> None:
        self.library = library
        super().__init__(layers, num_blocks, dtype, torch.device("cpu"))
        self.attend = library.attend[dtype]
        # What the kernels read, by layer: in one piece, for those that run many layers.
        self.structs = (LayerStruct * len(layers))()
        self.key_planes = (c_void_p * len(layers))(*(plane.data_ptr() for plane in self.keys))
        self.value_planes = (c_void_p * len(layers))(*(plane.data_ptr() for plane in self.values))
        self._filled: set[int] = set()

    def _empty(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in shapes]
        parts = self.library.empty(sum(sizes), self.dtype).split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def plan(self, rows: list[Row]) -> "NativeBatch":  # type: ignore[override]
        """Pointers for a batch of rows; use it for one forward pass."""
        return NativeBatch(self, rows)

    def fill(self, layer: int, spec: LayerSpec, num_heads: int) -> None:
        """Tell the kernels what they have to know of a layer; once is enough."""
        if layer not in self._filled:
            self._filled.add(layer)
            self.structs[layer] = LayerStruct(
                kv_heads=spec.kv_heads,
                group=num_heads // spec.kv_heads,
                head_dim=spec.head_dim,
                value_dim=spec.value_dim,
                num_slots=self.keys[layer].shape[1],
                window=spec.sliding_window or 0,
                scaling=spec.scaling,
                softcap=spec.softcap or 0.0,
            )


class NativeBatch:
    """The backend bound to one ragged batch: the `PagedContext` of a model call."""

    def __init__(self, backend: NativeBackend, rows: list[Row]) -> None:
        self.backend = backend
        self.rows = rows
        lengths = [len(row.tokens) for row in rows]
        self.offsets = [0]
        for length in lengths:
            self.offsets.append(self.offsets[-1] + length)
        # The kernel reads these arrays where they lie: they live as long as the batch.
        self._arrays = (
            array("q", self.offsets),
            array("q", [row.start for row in rows]),
            array("q", lengths),
            array("Q", [row.blocks.buffer_info()[0] for row in rows]),
        )
        self.long = [i for i, length in enumerate(lengths) if length >= LONG]
        self._flags = (
            array("B", [1] * len(rows)),
            array("B", [length < LONG for length in lengths]),
        )
        self._all, self._short = (
            BatchStruct(
                len(rows),
                torch.get_num_threads(),
                *(a.buffer_info()[0] for a in (*self._arrays, flags)),
            )
            for flags in self._flags
        )
        self._query, self._key, self._value = Strided(), Strided(), Strided()
        self.num_run = 0  # layers that this pass has behind it, where they run many at once
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def run_layers(
        self, decoders: int, first: int, count: int, x: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        """Compute `count` decoder layers from `first` on, in place; no row may be long.

        Args:
            decoders: address of their `DecoderStruct`s.
            x: [1, T, hidden], contiguous; what the first layer reads becomes what the last gives.
            cos, sin: [1, T, head size], contiguous.
        """
        backend, size = self.backend, ctypes.sizeof(c_void_p)
        backend.library.run_layers(
            decoders,
            ctypes.addressof(backend.structs) + first * ctypes.sizeof(LayerStruct),
            ctypes.addressof(backend.key_planes) + first * size,
            ctypes.addressof(backend.value_planes) + first * size,
            count,
            ctypes.addressof(self._all),
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            x.shape[1],
        )
        self.num_run = first + count

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
        sinks = None if sinks_Q is None else sinks_Q.float().contiguous()
        # torch's fused attention knows neither sinks nor a softcap
        by_torch = self.long if sinks is None and spec.softcap is None else []
        out_TQD = query_TQD.new_empty(*query_TQD.shape[:2], spec.value_dim)
        backend.fill(layer, spec, query_TQD.shape[1])
        backend.attend(
            backend.structs[layer],
            self._short if by_torch else self._all,
            backend.keys[layer].data_ptr(),
            backend.values[layer].data_ptr(),
            _point(self._query, query_TQD),
            _point(self._key, key_TKD),
            _point(self._value, value_TKD),
            None if sinks is None else sinks.data_ptr(),
            out_TQD.data_ptr(),
        )
        for i in by_torch:
            new = slice(self.offsets[i], self.offsets[i + 1])
            row = self.rows[i]
            if row.start == 0:
                key_KCD, value_KCD = (x[new].transpose(0, 1) for x in (key_TKD, value_TKD))
            else:
                slots = row_slots(row)
                key_KCD = backend.keys[layer].index_select(1, slots)
                value_KCD = backend.values[layer].index_select(1, slots)
            out_QSD = torch.nn.functional.scaled_dot_product_attention(
                query_TQD[new].transpose(0, 1).unsqueeze(0),
                key_KCD.unsqueeze(0),
                value_KCD.unsqueeze(0),
                attn_mask=(mask_SC := self._mask(i, spec.sliding_window)),
                is_causal=mask_SC is None,
                scale=spec.scaling,
                enable_gqa=True,
            )[0]
            out_TQD[new] = out_QSD.transpose(0, 1)
        return out_TQD

    def _mask(self, i: int, window: int | None) -> Tensor | None:
        """True where a long row's new tokens may look, [S, C]; None is the plain triangle."""
        row = self.rows[i]
        if row.start == 0 and window is None:
            return None
        if (i, window) not in self._masks:
            query_S1 = torch.arange(row.start, row.end).unsqueeze(1)
            position_C = torch.arange(row.end)
            mask_SC = position_C <= query_S1
            if window is not None:
                mask_SC &= position_C > query_S1 - window
            self._masks[i, window] = mask_SC
        return self._masks[i, window]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _point(struct: Strided, x_THD: Tensor) -> "ctypes._CArgObject":
    struct.data = x_THD.data_ptr()
    struct.token, struct.head, _ = x_THD.stride()
    return ctypes.byref(struct)
