"""Measuring: interleaved repeats, their median and spread, and the memory bandwidth they are held
against."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from r2r_glimp.native.library import Library, load_library


@dataclass(frozen=True, slots=True)
class Sample:
    """Repeats of one measurement; all in the same unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2 / self.median if self.median else 0.0


def interleave(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Sample]:
    """Call every run once per repeat, one after another, so that a slow spell hits all alike.

    Args:
        runs: each returns its measurement.
        repeats: rounds that count.
    """
    values: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            values[name].append(run())
    return {name: Sample(tuple(found)) for name, found in values.items()}


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which this device reads memory that is in no cache: the best of ten
    passes over 1 GiB. By sums in torch, and on the CPU by the kernels too, from large pages, where
    there are any; the faster one counts, so that no share of it flatters. Measured once."""
    return _read_bandwidth(device, torch.get_num_threads())


@cache
def _read_bandwidth(device: torch.device, num_threads: int) -> float:
    size, num_bytes = 2**28, 2**30
    library = load_library() if device.type == "cpu" else "it is no CPU"
    if isinstance(library, str):
        large = torch.ones(size, device=device)
    else:
        large = library.empty(size, torch.float32).fill_(1)

    def add() -> None:
        large.sum().item()

    def read() -> None:
        if isinstance(library, Library):
            library.read_memory(large.data_ptr(), num_bytes, num_threads)

    runs = [add] if isinstance(library, str) else [add, read]
    for run in runs:
        run()
    return num_bytes / min(seconds(run) for run in runs for _ in range(10))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one pass over a dense model reads: all but an embedding of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    every = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    if not tied and isinstance(embedding, nn.Embedding):
        del every[id(embedding.weight)]
    return sum(every.values())


class Clock:
    """Seconds spent in parts of a run: functions that are wrapped for as long as it is entered.

    Args:
        parts: name of a part, and the object and attribute whose calls are timed. Calls inside a
            timed call count for the outer one alone.
    """

    def __init__(self, parts: Mapping[str, list[tuple[Any, str]]]) -> None:
        self._parts = parts
        self._inside = False
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds = dict.fromkeys(self._parts, 0.0)
        self.calls = dict.fromkeys(self._parts, 0)

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """Time the parts meanwhile."""
        undo: list[tuple[Any, str, Any, bool]] = []
        for part, places in self._parts.items():
            for owner, name in places:
                undo.append((owner, name, getattr(owner, name), name in vars(owner)))
                setattr(owner, name, self._timed(part, getattr(owner, name)))
        try:
            yield self
        finally:
            for owner, name, original, own in reversed(undo):
                if own:
                    setattr(owner, name, original)
                else:
                    delattr(owner, name)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside, started = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[part] += time.perf_counter() - started
                self.calls[part] += 1

        return timed
