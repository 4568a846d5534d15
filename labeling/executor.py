"""Executors: where shards are labeled. Each gives the same bytes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from labeling.config import LabelingConfig
from labeling.progress import Meter
from labeling.shards import Entry, Shard
from labeling.worker import Worker
from r2r_glimp.models import Fingerprint, ModelPair


class Executor(Protocol):
    """Labels shards."""

    @property
    def run(self) -> dict[str, Any]:
        """What decides the labels: configuration and models."""
        ...

    @property
    def fingerprints(self) -> Mapping[str, Fingerprint | None]:
        """Of the pair and the judge."""
        ...

    def map(self, shards: Iterable[Shard], run_sha256: str, shown: Meter) -> Iterator[Entry]:
        """Label shards; their manifest entries as they are finished, in any order."""
        ...


class LocalExecutor:
    """One worker, in this process; it labels one shard after the other."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.run, self.fingerprints = worker.run, worker.fingerprints

    def map(self, shards: Iterable[Shard], run_sha256: str, shown: Meter) -> Iterator[Entry]:
        """Label shards."""
        self.worker.progress = shown.update
        for shard in shards:
            yield self.worker.label(shard, run_sha256)
            shown.finish_shard()


@contextmanager
def open_executor(config: LabelingConfig, pair: ModelPair | None) -> Iterator[Executor]:
    """The configured executor, for as long as it is entered.

    Args:
        pair: for the local one, instead of the configured one, in memory.

    Raises:
        UsageError, CheckpointError: models, judge or cluster are not to be had.
    """
    if config.executor == "local":
        yield LocalExecutor(Worker(config, pair))
        return
    from labeling.cluster import Cluster, RayExecutor

    with Cluster(config.ray) as cluster:
        executor = RayExecutor(config, cluster)
        try:
            yield executor
        finally:
            executor.close()
