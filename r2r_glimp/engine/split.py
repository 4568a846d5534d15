"""A model split over the processes of torchrun: the first runs the engine, the others its passes.

    process 0   Engine ─▶ SplitRunner.forward ──message──▶ forward ─▶ hidden states, logits
    process n             follow()            ◀────────── forward ─▶ let go
                          the model's own collectives join the parts inside of it

A message is numbers (rows, positions, block tables), over gloo; every process has planes for the
heads it holds. Nothing but the order of passes has to agree, so requests, sampling and routing are
the first process's alone.
"""

import atexit
from array import array
from datetime import timedelta

import torch
import torch.distributed as dist

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import UsageError
from r2r_glimp.engine.runner import ModelRunner, Rows
from r2r_glimp.models.pair import LoadedModel

_STOP, _ALLOCATE, _FORWARD = range(3)


class SplitRunner(ModelRunner):
    """The runner of a split model; in the first process it tells the others what it does.

    Args:
        loaded: the split model.
        kernels: as of `ModelRunner`.

    Raises:
        CheckpointError, UsageError: as `ModelRunner`.
    """

    def __init__(self, loaded: LoadedModel, kernels: str = "auto") -> None:
        if loaded.device.type == "cpu":
            kernels = "torch"  # its weights are no plain tensors, to be packed
        super().__init__(loaded, kernels)
        self.paths += f", split over {dist.get_world_size()} processes"
        self.is_first = dist.get_rank() == 0
        # an engine may wait for its next request as long as it likes
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        if self.is_first:
            atexit.register(self._tell, [_STOP])

    def allocate(self, num_blocks: int) -> None:
        if self.is_first:
            self._tell([_ALLOCATE, num_blocks])
        super().allocate(num_blocks)

    def forward(self, rows: list[Row], wanted: list[int]) -> Rows:
        if self.is_first:
            self._tell([_FORWARD, *_encode(rows, wanted)])
        return super().forward(rows, wanted)

    def keep_layer(self, layer: int) -> None:
        raise UsageError(
            f"hidden_layer={layer} of {self.loaded.name} is wanted, which is split over processes"
        )

    def follow(self) -> None:
        """Do what the first process does, until it ends."""
        while True:
            length = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(length, 0, group=self._group)
            message = torch.zeros(int(length), dtype=torch.int64)
            dist.broadcast(message, 0, group=self._group)
            kind, *content = message.tolist()
            if kind == _STOP:
                return
            if kind == _ALLOCATE:
                self.allocate(content[0])
            else:
                self.forward(*_decode(content))

    def _tell(self, message: list[int]) -> None:
        dist.broadcast(torch.tensor([len(message)]), 0, group=self._group)
        dist.broadcast(torch.tensor(message), 0, group=self._group)


def make_runner(loaded: LoadedModel, kernels: str) -> ModelRunner:
    """The runner of a model; of a split one only in the first process.

    Raises:
        SystemExit: in the other processes, once the first has ended: until then they compute their
            parts, and have nothing else to do.
    """
    if not loaded.is_split:
        return ModelRunner(loaded, kernels)
    runner = SplitRunner(loaded, kernels)
    if not runner.is_first:
        runner.follow()
        raise SystemExit(0)
    return runner


def _encode(rows: list[Row], wanted: list[int]) -> list[int]:
    numbers = []
    for row, num_wanted in zip(rows, wanted, strict=True):
        numbers += [num_wanted, row.start, len(row.tokens), len(row.blocks)]
        numbers += [*row.tokens, *row.blocks]
    return numbers


def _decode(numbers: list[int]) -> tuple[list[Row], list[int]]:
    rows, wanted, at = [], [], 0
    while at < len(numbers):
        num_wanted, start, num_tokens, num_blocks = numbers[at : at + 4]
        middle, end = at + 4 + num_tokens, at + 4 + num_tokens + num_blocks
        rows.append(Row(numbers[at + 4 : middle], start, array("i", numbers[middle:end])))
        wanted.append(num_wanted)
        at = end
    return rows, wanted
