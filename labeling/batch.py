"""Many labeling tasks over one engine, as one continuous batch.

A task is a generator: it yields lists of jobs and is sent their results, so that each answer's
stages read as straight code, while responses and branches of all answers run mixed.

    task ──[Write, …]──▶ engine, a continuous batch     ──▶ Written
         ──[Read, …]───▶ engine, many texts in one pass ──▶ what its fold makes of the rows
         ──[Ask, …]────▶ judge, in the background       ──▶ text
"""

import re
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from labeling.spans import span_ends
from r2r_glimp.core import (
    Decision,
    EngineError,
    FinishEvent,
    Model,
    RequestOutput,
    RoutingParams,
    SamplingParams,
    TokenEvent,
)
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prefill import read_rows
from r2r_glimp.engine.runner import Rows

Stage = Literal["respond", "compare", "continue", "verify"]


@dataclass(slots=True, kw_only=True)
class Write:
    """Have text written after a prompt.

    Args:
        stage: what its seconds are booked on.
        where: for messages.
        prompt: token ids.
        delimiter: stop when `lead` and what was written end a span; None goes on to the end of the
            text.
        lead: text of the span that stands before what is written.
        close: a text that ends a span too (the closing think tag).
    """

    stage: Stage
    where: str
    prompt: list[int]
    sampling: SamplingParams
    routing: RoutingParams
    delimiter: re.Pattern[str] | None = None
    lead: str = ""
    close: str | None = None

    def is_over(self, text: str) -> bool:
        """Whether a text, `lead` included, ends the span."""
        return span_ends(text, self.delimiter, self.close)


@dataclass(slots=True)
class Written:
    """What a `Write` gave; `finished` is False where a limit cut it."""

    tokens: list[int]
    finished: bool
    trace: list[Decision] | None = None


class Fold(Protocol):
    """Makes something small of a text's rows as they come."""

    def add(self, rows: Rows) -> None:
        """The next rows."""
        ...

    def result(self) -> Any:
        """What was made of all rows."""
        ...


@dataclass(slots=True, kw_only=True)
class Read:
    """Have a text read by one model: its rows, from `first` on, go to `fold`."""

    stage: Stage
    where: str
    model: Model
    tokens: list[int]
    first: int
    fold: Fold


@dataclass(slots=True)
class Ask:
    """Have a judge answer a prompt."""

    prompt: str


class Judge(Protocol):
    """Answers prompts, at once or in the background."""

    def ask(self, prompt: str) -> Future[str]:
        """The answer, sooner or later."""
        ...


T = TypeVar("T")
Job = Write | Read | Ask
Task = Generator[list[Job], list[Any], T]


@dataclass(slots=True)
class _Open:
    """A task that waits for the results of its last jobs."""

    index: int
    task: Task[Any]
    results: list[Any] = field(default_factory=list)
    num_missing: int = 0


@dataclass(slots=True)
class _Running:
    job: Write
    owner: _Open
    slot: int
    text: str
    num_tokens: int = 0  # of the span
    is_over: bool = False

    def add(self, event: TokenEvent) -> None:
        """A token was written; behind a server, more may come at once than the span has."""
        if not self.is_over:
            self.text += event.text
            self.num_tokens += 1
            self.is_over = self.job.is_over(self.text)


class Batch:
    """Runs tasks; `seconds` says how long each stage took of the time, `num_written` counts tokens.

    Args:
        engine: idle; nobody else steps it meanwhile.
        judge: answers what tasks ask.
    """

    def __init__(self, engine: Engine, judge: Judge | None = None) -> None:
        self.engine = engine
        self.judge = judge
        self.max_batch = engine.scheduler.max_batch
        self.seconds: dict[Stage, float] = dict.fromkeys(
            ("respond", "compare", "continue", "verify"), 0.0
        )
        self.num_written = 0
        self._ready: deque[_Open] = deque()
        self._writes: deque[tuple[Write, _Open, int]] = deque()
        self._reads: list[tuple[Read, _Open, int]] = []
        self._running: dict[str, _Running] = {}
        self._stopped: dict[str, _Running] = {}  # aborted at their delimiter, not yet reported
        self._asked: dict[Future[str], tuple[_Open, int]] = {}

    def run(self, tasks: Iterable[Task[T]]) -> Iterator[tuple[int, T]]:
        """Results with the index of their task, as they come. Tasks are started in order, when
        there is room."""
        waiting = enumerate(tasks)
        exhausted = False
        try:
            while True:
                yield from self._advance()
                self._fill()
                if not exhausted and not self._writes and len(self._running) < self.max_batch:
                    following = next(waiting, None)
                    exhausted = following is None
                    if following is not None:
                        self._ready.append(_Open(*following))
                        continue
                if not (self._running or self._stopped or self._reads or self._asked):
                    return
                self._work()
        finally:
            for request_id in self._running:
                self.engine.abort(request_id)
            self._running.clear()
            self._stopped.clear()

    def _advance(self) -> Iterator[tuple[int, Any]]:
        """Let every task go on whose jobs are done."""
        while self._ready:
            owner = self._ready.popleft()
            try:
                jobs = owner.task.send(owner.results if owner.results else None)  # type: ignore[arg-type]
            except StopIteration as stop:
                yield owner.index, stop.value
                continue
            assert jobs, "a task that yields no jobs would never go on"
            owner.results, owner.num_missing = [None] * len(jobs), len(jobs)
            for slot, job in enumerate(jobs):
                self._queue(job, owner, slot)

    def _queue(self, job: Job, owner: _Open, slot: int) -> None:
        if isinstance(job, Write):
            self._writes.append((job, owner, slot))
        elif isinstance(job, Read):
            self._reads.append((job, owner, slot))
        else:
            assert self.judge is not None, "a verifier that asks needs a judge"
            started = time.perf_counter()
            self._asked[self.judge.ask(job.prompt)] = (owner, slot)
            self.seconds["verify"] += time.perf_counter() - started

    def _fill(self) -> None:
        """Hand the engine as many requests as it runs at once."""
        while self._writes and len(self._running) < self.max_batch:
            job, owner, slot = self._writes.popleft()
            request_id = self.engine.add_request(job.prompt, job.sampling, job.routing)
            self._running[request_id] = _Running(job, owner, slot, job.lead)

    def _work(self) -> None:
        """One tick of the engine, what can be read between two ticks, and the judge's answers."""
        self._read()
        if self._running or self._stopped:
            self._step()
        elif self._asked and not self._ready:
            started = time.perf_counter()
            wait(self._asked, return_when=FIRST_COMPLETED)
            self.seconds["verify"] += time.perf_counter() - started
        for future in [f for f in self._asked if f.done()]:
            owner, slot = self._asked.pop(future)
            self._deliver(owner, slot, future.result())

    def _read(self) -> None:
        """Read all that waits to be read, as far as there are blocks."""
        for model in Model:
            reads = [one for one in self._reads if one[0].model is model]
            if not reads:
                continue
            started = time.perf_counter()
            texts = [(job.tokens, job.first) for job, _, _ in reads]
            touched: set[int] = set()
            try:
                for index, rows in read_rows(self.engine, model, texts):
                    touched.add(index)
                    reads[index][0].fold.add(rows)
            except (RuntimeError, EngineError) as error:
                where = reads[max(touched, default=0)][0].where
                raise EngineError(f"{where}: the {model.name} failed: {error}") from error
            assert touched or self._running, "a text fits when nothing else runs"
            done = [reads[index] for index in sorted(touched)]
            untouched = [one for i, one in enumerate(reads) if i not in touched]
            self._reads = [one for one in self._reads if one[0].model is not model] + untouched
            elapsed = time.perf_counter() - started
            for job, owner, slot in done:
                self.seconds[job.stage] += elapsed / len(done)
                self._deliver(owner, slot, job.fold.result())

    def _step(self) -> None:
        started = time.perf_counter()
        stages = [running.job.stage for running in self._running.values()]
        written: set[str] = set()
        for event in self.engine.step():
            if isinstance(event, FinishEvent):
                stopped = self._stopped.pop(event.request_id, None)
                running = stopped or self._running.pop(event.request_id, None)
                if running is not None:  # else a request that somebody else has aborted
                    self._finish(running, event.output)
            elif event.request_id in self._running:
                self.num_written += 1
                self._running[event.request_id].add(event)
                written.add(event.request_id)
        # In order of their start, not in a set's: what is done next must not depend on hashing.
        for request_id in [r for r in self._running if r in written and self._running[r].is_over]:
            self._stopped[request_id] = self._running.pop(request_id)
            self.engine.abort(request_id)
        elapsed = time.perf_counter() - started
        for stage in set(stages):
            self.seconds[stage] += elapsed * stages.count(stage) / len(stages)

    def _finish(self, running: _Running, output: RequestOutput) -> None:
        if output.finish_reason == "error":
            raise EngineError(f"{running.job.where}: {output.error}")
        finished = output.finish_reason == "stop" or running.is_over
        tokens = output.token_ids[: running.num_tokens] if running.is_over else output.token_ids
        self._deliver(running.owner, running.slot, Written(tokens, finished, output.trace))

    def _deliver(self, owner: _Open, slot: int, result: Any) -> None:
        owner.results[slot] = result
        owner.num_missing -= 1
        if owner.num_missing == 0:
            self._ready.append(owner)
