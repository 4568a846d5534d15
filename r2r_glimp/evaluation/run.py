"""Runs systems on a task; what was answered before is not asked again.

engine ──answers, as they finish──▶ threads that grade ──▶ a line per sample
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from labeling.formats import Question
from r2r_glimp.core import (
    FinishEvent,
    Prompt,
    R2RGlimpError,
    RequestOutput,
    RoutingParams,
    SamplingParams,
)
from r2r_glimp.engine.engine import Engine
from r2r_glimp.evaluation.grading.grader import Verdict
from r2r_glimp.evaluation.oracle import Oracle
from r2r_glimp.evaluation.store import Sample, SampleWriter, Store
from r2r_glimp.evaluation.system import BASELINES, ORACLE, System
from r2r_glimp.evaluation.task import Task
from r2r_glimp.routing.routers import Router


@dataclass(frozen=True, slots=True)
class Setting:
    """What all systems share.

    Attributes:
        sampling: of every answer; a question's own seed is derived from its seed.
        routing: limits; router, granularity and threshold are the system's.
        repeats: answers per question.
        templated: whether a question is put into a user's message.
    """

    sampling: SamplingParams
    routing: RoutingParams
    repeats: int = 1
    templated: bool = True

    def prompt(self, question: Question) -> Prompt:
        """A question as the models are asked it."""
        if not self.templated:
            return question.prompt
        return [{"role": "user", "content": question.prompt}]


def answer_all(
    engine: Engine,
    task: Task,
    system: System,
    router: Router | None,
    setting: Setting,
    store: Store,
    progress: Callable[[], None],
) -> list[Sample]:
    """Every sample of a system, from the store or answered now; failed ones are tried again.

    Args:
        router: the system's, loaded; None for the oracle.
        progress: called with each graded answer.

    Raises:
        UsageError, DataError: a question does not fit; nothing is answered then.
    """
    done = store.answered(system.slug)
    asked = [(q, r) for r in range(setting.repeats) for q in task.questions]
    missing = [(q, r) for q, r in asked if (q.id, r) not in done]
    places = {q.id: place for place, q in enumerate(task.questions)}
    samplings = [_seeded(setting, places[q.id], r, len(task.questions)) for q, r in missing]
    prompts = [setting.prompt(question) for question, _ in missing]

    def keep(sample: Sample) -> None:
        done[sample.id, sample.repeat] = sample
        progress()

    with store.writer(system.slug) as writer, _Grading(task, missing, writer, keep) as grading:
        if missing and system.router == ORACLE:
            routing = replace(setting.routing, granularity=system.granularity)
            oracle = Oracle(engine, task, routing)
            outputs = oracle.answer([q for q, _ in missing], prompts, samplings)
            for place, output in enumerate(outputs):
                grading.add(place, output)
        elif missing:
            _route(engine, prompts, samplings, _routing(system, router, setting), grading)
        grading.collect(everything=True)
    return [done[q.id, r] for q, r in asked]


class _Grading:
    """Answers that are being graded, beside the engine's work; samples are written by one thread.

    Args:
        asked: question and repeat of each place.
        keep: takes each sample, once it is written.
    """

    def __init__(
        self,
        task: Task,
        asked: Sequence[tuple[Question, int]],
        writer: SampleWriter,
        keep: Callable[[Sample], None],
    ) -> None:
        self._task, self._asked, self._writer, self._keep = task, asked, writer, keep
        self._pool = ThreadPoolExecutor(task.grader.workers)
        self._waiting: dict[Future[Verdict], tuple[int, RequestOutput]] = {}

    def __enter__(self) -> "_Grading":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, place: int, output: RequestOutput) -> None:
        """Have an answer graded."""
        question, _ = self._asked[place]
        if output.error is None:
            future = self._pool.submit(self._task.grade, question, output.text)
        else:
            future = Future()
            future.set_result(Verdict("unanswered", None))
        self._waiting[future] = (place, output)

    def collect(self, *, everything: bool = False) -> None:
        """Write what is graded; with `everything`, wait for the rest."""
        while self._waiting:
            timeout = None if everything else 0
            graded = wait(self._waiting, timeout, FIRST_COMPLETED).done
            if not graded:
                return
            for future in graded:
                place, output = self._waiting.pop(future)
                sample = _sample(*self._asked[place], output, future)
                self._writer.add(sample)
                self._keep(sample)


def _route(
    engine: Engine,
    prompts: Sequence[Prompt],
    samplings: Sequence[SamplingParams],
    routing: RoutingParams,
    grading: _Grading,
) -> None:
    places: dict[str, int] = {}
    try:
        for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            places[engine.add_request(prompt, sampling, routing)] = place
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, FinishEvent):
                    grading.add(places[event.request_id], event.output)
            grading.collect()
    finally:
        for id in places:  # interrupted: leave nothing behind
            engine.abort(id)


def _routing(system: System, router: Router | None, setting: Setting) -> RoutingParams:
    if system.router in BASELINES:  # alone, whoever answers and whatever the cap
        return replace(setting.routing, router=router, answer_by=None, max_llm_share=None)
    return replace(
        setting.routing,
        router=router,
        granularity=system.granularity,
        threshold=system.threshold,
    )


def _seeded(setting: Setting, place: int, repeat: int, num_questions: int) -> SamplingParams:
    """With one seed for all, all would draw alike; every system draws from the same ones."""
    seed = (setting.sampling.seed or 0) + repeat * num_questions + place
    return replace(setting.sampling, seed=seed)


def _sample(
    question: Question, repeat: int, output: RequestOutput, graded: Future[Verdict]
) -> Sample:
    error, verdict = output.error, Verdict("undecided", None)
    try:
        verdict = graded.result()
    except R2RGlimpError as problem:
        error = f"not graded: {problem}"
    stats = output.stats
    return Sample(
        id=question.id,
        repeat=repeat,
        grade=verdict.grade,
        answer=verdict.answer,
        gold=str(question.answer),
        finish_reason=output.finish_reason,
        slm_tokens=stats.slm_tokens,
        llm_tokens=stats.llm_tokens,
        switches=stats.switches,
        decisions=stats.decisions,
        deferrals=stats.deferrals,
        slm_computed=stats.slm_computed,
        llm_computed=stats.llm_computed,
        text=output.text,
        note=verdict.note,
        error=error,
        elapsed_s=round(stats.elapsed_s, 3),
    )
