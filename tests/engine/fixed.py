"""Passes of fixed shape without a GPU: their bodies run as they are, over plain torch that reads
the same static tensors as the kernels do."""

import torch
from torch import Tensor

from r2r_glimp.attention.gather import GatherBackend, _attend
from r2r_glimp.attention.paged import LayerSpec, PagedContext
from r2r_glimp.attention.rows import BatchTensors
from r2r_glimp.engine.graphs import Body, Graphs
from r2r_glimp.engine.runner import ModelRunner
from r2r_glimp.kv.pool import BLOCK_SIZE
from r2r_glimp.routing.routers import Router


class StaticGather:
    """Attention over the planes of a gather backend, under tensors that change between calls."""

    def __init__(self, backend: GatherBackend, tensors: BatchTensors) -> None:
        self.backend, self.tensors = backend, tensors

    def attend(
        self,
        layer: int,
        query_TQD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        spec: LayerSpec,
        sinks_Q: Tensor | None,
    ) -> Tensor:
        keys, values, t = self.backend.keys[layer], self.backend.values[layer], self.tensors
        written = t.slots_T >= 0
        slots = t.slots_T[written].long()
        keys[:, slots] = key_TKD[written].transpose(0, 1)
        values[:, slots] = value_TKD[written].transpose(0, 1)
        out_TQD = query_TQD.new_zeros(*query_TQD.shape[:2], spec.value_dim)
        for i, (first, new, length) in enumerate(
            zip(t.first_N.tolist(), t.new_N.tolist(), t.lengths_N.tolist(), strict=True)
        ):
            if not length:
                continue
            position_C = torch.arange(length)
            slots_C = t.tables_NP[i].long()[position_C // BLOCK_SIZE] * BLOCK_SIZE
            slots_C += position_C % BLOCK_SIZE
            query_S1 = torch.arange(length - new, length).unsqueeze(1)
            mask_SC = position_C <= query_S1
            if spec.sliding_window is not None:
                mask_SC &= position_C > query_S1 - spec.sliding_window
            out_TQD[first : first + new] = _attend(
                query_TQD[first : first + new],
                keys[:, slots_C],
                values[:, slots_C],
                mask_SC.unsqueeze(0),
                spec,
                sinks_Q,
            )
        return out_TQD


def run_as_it_is(body: Body) -> Body:
    """In the place of a capture."""
    body()  # as a capture does: on padding alone
    return body


def uncaptured(runner: ModelRunner, max_rows: int, max_length: int) -> Graphs:
    backend = runner.backend
    assert backend is not None

    def bind(tensors: BatchTensors) -> PagedContext:
        return StaticGather(backend, tensors)

    return Graphs(runner, bind, max_rows, max_length, run_as_it_is)


def uncaptured_graphs(
    runners: tuple[ModelRunner, ModelRunner],
    router: Router,
    max_rows: int,
    max_lengths: list[int],
) -> tuple[Graphs, Graphs]:
    """In the place of `make_graphs`."""
    slm, llm = (
        uncaptured(runner, max_rows, length)
        for runner, length in zip(runners, max_lengths, strict=True)
    )
    return slm, llm
