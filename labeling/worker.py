"""Worker: loads the pair once, then turns shards into files."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from labeling.batch import Batch
from labeling.config import LabelingConfig
from labeling.files import write_atomic
from labeling.judge import LocalJudge, make_judge
from labeling.label import Labeled, count, describe, label, to_table
from labeling.respond import Dropped
from labeling.setting import Setting
from labeling.shards import Entry, Shard, ShardStore
from r2r_glimp.core import EngineError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prefill import forget_prefixes
from r2r_glimp.models import Fingerprint, ModelPair
from r2r_glimp.routing.routers import NAMED_ROUTERS, Router, named_router

FORMAT = 1  # of shards
ANSWERS_KEY = b"labeling"  # of a shard's metadata: the answers and their forks, as JSON
_MIN_VERDICTS = 20  # before a share of unparsable ones means anything

Progress = Callable[[int, int], None]  # of a shard: questions done, tokens written


class Worker:
    """Labels shards with one engine.

    Args:
        config: of the run.
        pair: instead of the configured one, in memory.
        progress: called after each question.

    Raises:
        UsageError, CheckpointError: pair, router or judge cannot be loaded, or do not fit.
    """

    def __init__(
        self,
        config: LabelingConfig,
        pair: ModelPair | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.store = ShardStore(config.out_dir)
        self.progress = progress or (lambda questions, tokens: None)
        pair = pair or load_pair(config)
        self.engine = Engine(
            pair,
            router="llm",
            kv_memory=config.engine.kv_memory,
            llm_min_batch=1,  # no clock decides who shares a pass: the same bytes at every run
            max_batch=config.engine.max_batch,
            max_batch_tokens=config.engine.max_batch_tokens,
        )
        self.setting = Setting.resolve(config, self.engine, _load_router(config.responses.router))
        self.judge = None
        if config.verifier.kind == "judge":
            self.judge = make_judge(config.verifier.judge, config.device, config.engine.kv_memory)
        self.fingerprints = {
            "slm": pair.slm.fingerprint,
            "llm": pair.llm.fingerprint,
            "judge": self.judge.fingerprint if isinstance(self.judge, LocalJudge) else None,
        }
        models = {role: _identity(found) for role, found in self.fingerprints.items()}
        self.run: dict[str, Any] = {"format": FORMAT, "config": config.identity(), **models}

    def label(self, shard: Shard, run_sha256: str) -> Entry:
        """Label a shard's questions and put its file into place; what the manifest says of it.

        Raises:
            DataError: a question does not fit.
            EngineError: a model failed, or the judge, or the disk is full.
        """
        forget_prefixes(self.engine)  # a shard's bytes must not depend on the shards before
        batch = Batch(self.engine, self.judge)
        n = self.config.responses.n
        tasks = (label(q, i, self.setting) for q in shard.questions for i in range(n))
        results: dict[int, Labeled | Dropped] = {}
        for index, result in batch.run(tasks):
            results[index] = result
            self.progress(len(results) // n, batch.num_written)
        started = time.perf_counter()
        ordered = [results[i] for i in sorted(results)]
        labeled = [one for one in ordered if isinstance(one, Labeled)]
        table = to_table(labeled, self.setting)
        counts = count(ordered, table.num_rows) | {"questions": len(shard.questions)}
        self._check_judge(counts)
        data = _serialize(table, [describe(one) for one in labeled])
        write_atomic(self.store.path(shard.index), data)
        seconds = {str(stage): spent for stage, spent in batch.seconds.items()}
        seconds["write"] = time.perf_counter() - started
        return Entry(
            shard=shard.index,
            num_questions=len(shard.questions),
            input_sha256=shard.input_sha256,
            run_sha256=run_sha256,
            sha256=hashlib.sha256(data).hexdigest(),
            num_bytes=len(data),
            counts=counts,
            seconds={stage: round(s, 3) for stage, s in seconds.items()},
        )

    def _check_judge(self, counts: dict[str, int]) -> None:
        if self.config.verifier.kind != "judge":
            return
        asked = counts.get("token_forks", 0) + counts.get("step_forks", 0)
        unparsable, most = counts.get("unparsable", 0), self.config.verifier.judge.max_unparsable
        if asked >= _MIN_VERDICTS and unparsable > most * asked:
            raise EngineError(
                f"the judge gave no verdict on {unparsable} of {asked} differences: it must answer "
                "SAME or DIFFERENT alone (one that thinks needs a higher verifier.judge.max_tokens)"
            )


def load_pair(config: LabelingConfig) -> ModelPair:
    """The configured pair."""
    chosen = {"device": config.device, "dtype": config.dtype}
    return ModelPair.from_config(config.pair, **{k: v for k, v in chosen.items() if v is not None})


def _load_router(name: str | None) -> Router | None:
    if name is None or name in NAMED_ROUTERS:
        return named_router(name) if name else None
    from r2r_glimp.hub import load_router

    return load_router(name)


def _identity(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    """What must stay the same of a model during a run; where it lies may change."""
    if fingerprint is None:
        return None
    kept = replace(fingerprint, name_or_path="", revision=None).to_dict()
    del kept["name_or_path"], kept["revision"]
    return kept


def _serialize(table: pa.Table, answers: list[dict[str, Any]]) -> memoryview:
    """An Arrow stream, the form that `datasets` maps into memory."""
    notes = json.dumps(answers, ensure_ascii=False).encode("utf-8", "replace")
    metadata = {**(table.schema.metadata or {}), ANSWERS_KEY: notes}
    table = table.replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())
