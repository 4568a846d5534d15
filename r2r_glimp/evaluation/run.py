"""Runs systems on a task; what was answered before is not asked again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from labeling.formats import Question
from r2r_glimp.core import FinishEvent, Prompt, RequestOutput, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.evaluation.oracle import Oracle
from r2r_glimp.evaluation.store import Sample, Store
from r2r_glimp.evaluation.system import ORACLE, System
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
    """Every sample of a system, from the store or answered now.

    Args:
        router: the system's, loaded; None for the oracle.
        progress: called with each answer.

    Raises:
        UsageError, DataError: a question does not fit; nothing is answered then.
    """
    done = store.samples(system.slug)
    asked = [(q, r) for r in range(setting.repeats) for q in task.questions]
    missing = [(q, r) for q, r in asked if (q.id, r) not in done]
    places = {q.id: place for place, q in enumerate(task.questions)}
    samplings = [_seeded(setting, places[q.id], r, len(task.questions)) for q, r in missing]
    prompts = [setting.prompt(question) for question, _ in missing]
    with store.writer(system.slug) as writer:

        def record(place: int, output: RequestOutput) -> None:
            question, repeat = missing[place]
            sample = _sample(task, question, repeat, output)
            writer.add(sample)
            done[question.id, repeat] = sample
            progress()

        if missing and system.router == ORACLE:
            routing = replace(setting.routing, granularity=system.granularity)
            oracle = Oracle(engine, task, routing)
            outputs = oracle.answer([q for q, _ in missing], prompts, samplings)
            for place, output in enumerate(outputs):
                record(place, output)
        elif missing:
            _route(engine, prompts, samplings, _routing(system, router, setting), record)
    return [done[q.id, r] for q, r in asked]


def _route(
    engine: Engine,
    prompts: Sequence[Prompt],
    samplings: Sequence[SamplingParams],
    routing: RoutingParams,
    record: Callable[[int, RequestOutput], None],
) -> None:
    places: dict[str, int] = {}
    try:
        for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            places[engine.add_request(prompt, sampling, routing)] = place
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, FinishEvent):
                    record(places[event.request_id], event.output)
    finally:
        for id in places:  # interrupted: leave nothing behind
            engine.abort(id)


def _routing(system: System, router: Router | None, setting: Setting) -> RoutingParams:
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


def _sample(task: Task, question: Question, repeat: int, output: RequestOutput) -> Sample:
    stats = output.stats
    return Sample(
        id=question.id,
        repeat=repeat,
        grade=task.grade(question, output.text),
        answer=task.extract(output.text),
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
        error=output.error,
    )
