"""A run: plan the shards, label those that are missing, build. What the command line calls."""

from typing import Any

from labeling.build import build
from labeling.config import LabelingConfig
from labeling.executor import Executor, open_executor
from labeling.progress import meter
from labeling.shards import Shard, ShardStore, plan
from labeling.sources import load_questions
from labeling.worker import FORMAT
from r2r_glimp.models import ModelPair


def run(config: LabelingConfig, pair: ModelPair | None = None) -> dict[str, Any] | None:
    """Label what is missing of a run, and build its dataset when every shard is there.

    Args:
        pair: instead of the configured one, in memory.

    Returns:
        The summary; None where other processes still have shards to finish.

    Raises:
        UsageError, DataError, CheckpointError, EngineError: each of one line.
    """
    given = config.responses.by == "input"
    questions = load_questions(config.source, limit=config.limit, with_responses=given)
    shards = plan(questions, config.shard_size)
    store = ShardStore(config.out_dir)
    with store.lock(config):
        if config.overwrite or (config.num_shards == 1 and store.has_nothing()):
            store.clear()
        else:
            store.refuse_strangers()
        # Before models are loaded, which may take minutes.
        store.check({"format": FORMAT, "config": config.identity()})
        with open_executor(config, pair) as executor:
            run_sha256 = store.start(executor.run)
            mine = [s for s in shards if s.index % config.num_shards == config.shard_index]
            missing = _missing(store, mine, run_sha256)
            if missing:
                _label(store, executor, mine, missing, run_sha256)
            fingerprints = executor.fingerprints
        with store.lock_build():
            if _missing(store, shards, run_sha256):
                return None
            entries = store.entries()
            return build(store, config, [entries[s.index] for s in shards], fingerprints)


def _missing(store: ShardStore, shards: list[Shard], run_sha256: str) -> list[Shard]:
    entries = store.entries()
    return [s for s in shards if not store.is_finished(s, entries.get(s.index), run_sha256)]


def _label(
    store: ShardStore,
    executor: Executor,
    mine: list[Shard],
    missing: list[Shard],
    run_sha256: str,
) -> None:
    total = sum(len(shard.questions) for shard in mine)
    done = total - sum(len(shard.questions) for shard in missing)
    with meter(total, done) as shown:
        for entry in executor.map(missing, run_sha256, shown):
            store.record(entry)
