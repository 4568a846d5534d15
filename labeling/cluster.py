"""Labeling on a Ray cluster: workers load the pair once each, shards come and go as files.

    this process ──shard: questions──▶ worker (an actor: models, engine, judge)
                 ◀──manifest entry───     └──▶ OUT/shards/00003.arrow, on storage that all nodes see

Nothing large passes through Ray: no rows, no hidden states, no weights. A worker is an actor and
not a plain task, so that models are loaded once and a GPU stays with the process that uses it. Ray
starts a worker that died again and gives it the same shard; a shard's bytes depend on nothing else.
"""

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from labeling.config import LabelingConfig
from labeling.progress import Meter
from labeling.sections import RayConfig
from labeling.shards import Entry, Shard, ShardStore, find_difference
from labeling.worker import Worker
from r2r_glimp.core import CheckpointError, EngineError, R2RGlimpError, UsageError
from r2r_glimp.models import Fingerprint

log = logging.getLogger(__name__)
_SAY_EVERY_S = 60.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Cluster:
    """Ray, joined or started for as long as this is entered.

    Raises:
        UsageError: Ray is not installed, the cluster does not answer, or no node has what a worker
            needs.
    """

    def __init__(self, config: RayConfig) -> None:
        self.config = config
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # read when ray is imported
        try:
            import ray
        except ImportError:
            raise UsageError(
                "executor=ray needs Ray, which is not installed: pip install 'r2r_glimp[ray]'"
            ) from None
        self.ray = ray

    def __enter__(self) -> "Cluster":
        try:
            with _own_signals():
                self.ray.init(
                    address=self.config.address or "local",
                    include_dashboard=False if self.config.address is None else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            where = f"ray.address={self.config.address!r}"
            raise UsageError(f"{where}: no Ray cluster answers: {_first_line(error)}") from None
        try:
            self.num_workers = self._room()
        except BaseException:
            self.ray.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    def _room(self) -> int:
        """Workers to start: as many as are wanted, or as there is room for."""
        needs = {name: amount for name, amount in self.config.needs.items() if amount}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        room = sum(
            int(min(node.get(name, 0) / amount for name, amount in needs.items())) for node in nodes
        )
        if not room:
            wanted = ", ".join(f"{name}: {amount:g}" for name, amount in needs.items())
            raise UsageError(
                f"no node of the Ray cluster has room for one worker ({wanted}): see ray.cpus, "
                "ray.gpus and ray.resources, and `ray status`"
            )
        return self.config.workers or room


class RayExecutor:
    """Labels shards on the workers of a cluster.

    Raises:
        UsageError, CheckpointError: what a worker says of pair, router or judge.
    """

    def __init__(self, config: LabelingConfig, cluster: Cluster) -> None:
        # Workers run in folders of their own.
        self.config = replace(config, out=str(config.out_dir.resolve()))
        self.store = ShardStore(config.out_dir)
        self.ray = cluster.ray
        self.num_workers = cluster.num_workers
        self._workers: list[Any] = []
        self.run, self.fingerprints = self.start_workers(1)

    run: dict[str, Any]
    fingerprints: Mapping[str, Fingerprint | None]

    def start_workers(self, num: int) -> tuple[dict[str, Any], Mapping[str, Fingerprint | None]]:
        """Have at least so many workers, the last one loaded; what it says of the run."""
        self._add_workers(num)
        described: tuple[dict[str, Any], Mapping[str, Fingerprint | None]]
        described = self._get(self._workers[-1].describe.remote(), "the pair")
        return described

    def map(self, shards: Iterable[Shard], run_sha256: str, shown: Meter) -> Iterator[Entry]:
        """Label shards, each on the next worker that is free."""
        waiting = deque(shards)
        self._add_workers(min(self.num_workers, len(waiting)))
        busy: dict[Any, tuple[Any, Shard | None]]
        busy = {worker.describe.remote(): (worker, None) for worker in self._workers}
        num_under_way = num_tokens = 0
        while waiting or num_under_way:
            reference = self._wait(list(busy))
            worker, shard = busy.pop(reference)
            if shard is None:
                self._check_same(self._get(reference, "the pair")[0])
            else:
                num_under_way -= 1
                entry = self._get(reference, f"shard {shard.index}")
                self._check_visible(entry)
                yield entry
                num_tokens += entry.counts.get("tokens", 0)
                shown.update(len(shard.questions), num_tokens)
                shown.finish_shard()
            if waiting:
                shard = waiting.popleft()
                busy[worker.label.remote(shard, run_sha256)] = (worker, shard)
                num_under_way += 1
        self.store.sweep()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self.ray.kill(worker)
        self._workers.clear()

    def _add_workers(self, num: int) -> None:
        needs = self.config.ray
        options = {
            "num_cpus": needs.cpus,
            "num_gpus": needs.gpus,
            "resources": needs.resources,
            "max_restarts": -1,
            "max_task_retries": needs.retries,
        }
        remote = self.ray.remote(**options)(_Worker)
        self._workers += [remote.remote(self.config) for _ in range(num - len(self._workers))]

    def _wait(self, references: list[Any]) -> Any:
        """The next that is done."""
        while True:
            with _signals_pass():
                done, _ = self.ray.wait(references, num_returns=1, timeout=_SAY_EVERY_S)
            if done:
                return done[0]
            log.warning("no shard was finished for %g s; `ray status` says why", _SAY_EVERY_S)

    def _get(self, reference: Any, what: str) -> Any:
        """A result; what went wrong on the worker goes wrong here, in the same words."""
        errors = self.ray.exceptions
        try:
            with _signals_pass():
                return self.ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, R2RGlimpError):
                raise error.cause from None
            raise EngineError(f"{what}: a Ray worker failed: {error.cause!r:.300}") from error
        except errors.RayError as error:
            times = f"{self.config.ray.retries + 1} times"
            raise EngineError(
                f"{what}: its Ray worker died {times} ({_first_line(error)}); what is finished is "
                "kept: run the same command again"
            ) from error

    def _check_same(self, run: dict[str, Any]) -> None:
        if difference := find_difference(self.run, run):
            raise CheckpointError(f"two Ray workers load different models: {difference}")

    def _check_visible(self, entry: Entry) -> None:
        path = self.store.path(entry.shard)
        if not path.exists() or path.stat().st_size != entry.num_bytes:
            raise UsageError(
                f"a Ray worker wrote {path}, and it cannot be seen here: out must be a folder "
                "that all nodes share"
            )


class _Worker:
    """What runs in a Ray worker's process. Loads at the first call, and again after a restart."""

    def __init__(self, config: LabelingConfig) -> None:
        self.config = config
        self._worker: Worker | None = None
        logging.getLogger("r2r_glimp.engine").setLevel(logging.CRITICAL)  # as in the command

    def describe(self) -> tuple[dict[str, Any], Mapping[str, Fingerprint | None]]:
        """What decides the labels, and the models' fingerprints."""
        worker = self._loaded()
        return worker.run, worker.fingerprints

    def label(self, shard: Shard, run_sha256: str) -> Entry:
        """Label a shard."""
        return self._loaded().label(shard, run_sha256)

    def _loaded(self) -> Worker:
        if self._worker is None:
            _use_cores(self.config.ray.cpus)
            self._worker = Worker(self.config)
        return self._worker


def _use_cores(cpus: float) -> None:
    import torch

    torch.set_num_threads(max(1, int(cpus)))


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes over SIGTERM; this process has its own way to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _signals_pass() -> Iterator[None]:
    """What a signal's handler raises comes out of Ray as itself, not as a SystemError."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
