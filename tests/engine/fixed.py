"""Passes of fixed shape without a GPU: their bodies run as they are, over plain torch that reads
the same static tensors as the kernels do."""

from functools import partial

import pytest
import torch
from torch import Tensor

from r2r_glimp.attention.gather import GatherBackend, _attend
from r2r_glimp.attention.paged import LayerSpec, PagedContext
from r2r_glimp.attention.rows import BatchTensors
from r2r_glimp.engine import graphs
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


def run_as_it_is(body: graphs.Body) -> graphs.Body:
    """In the place of a capture."""
    body()  # as a capture does: on padding alone
    return body


def bind(backend: GatherBackend, tensors: BatchTensors) -> PagedContext:
    return StaticGather(backend, tensors)


def run_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every engine from here on run passes of fixed shape where it can."""
    monkeypatch.setattr(graphs, "capture_on", lambda device: run_as_it_is)
    monkeypatch.setattr(GatherBackend, "bind", bind, raising=False)


def uncaptured(
    runner: ModelRunner, max_rows: int, max_length: int, router: Router | None = None
) -> graphs.Graphs:
    backend = runner.backend
    assert backend is not None
    bound = partial(bind, backend)
    return graphs.Graphs(runner, bound, max_rows, max_length, run_as_it_is, router)
