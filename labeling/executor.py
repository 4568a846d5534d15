"""Executors: where shards are labeled. Each gives the same bytes."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from labeling.shards import Entry, Shard
from labeling.worker import Worker


class Executor(Protocol):
    """Labels shards; their manifest entries come as they are finished, in any order."""

    def map(self, shards: Iterable[Shard]) -> Iterator[Entry]:
        """Label shards."""
        ...


class LocalExecutor:
    """One worker, in this process."""

    def __init__(self, worker: Worker, run_sha256: str) -> None:
        self.worker = worker
        self.run_sha256 = run_sha256

    def map(self, shards: Iterable[Shard]) -> Iterator[Entry]:
        """Label shards one after the other."""
        for shard in shards:
            yield self.worker.label(shard, self.run_sha256)
