"""The oracle: labels in the loop. What routing could save if it knew which choices matter.

The SLM writes. Where the text ends at a wrong answer, some span of the SLM's was the first after
which the LLM, going on from there, no longer ends at the right one. That span is the LLM's, and the
SLM writes on behind it, until the answer is right or even the LLM alone would not get there.

    SLM's text   ─────●────●────●────●───▶ wrong        ● places of a decision
    LLM from here     ✓    ✓    ✗    ✗                  found by bisection, all questions at once
                           └─ this span goes to the LLM
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from labeling.formats import Question
from r2r_glimp.core import Prompt, RequestOutput, RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.evaluation.task import Task
from r2r_glimp.routing.routers import ReplayRouter

_MAX_SPANS = 64  # handed over per question, at most


@dataclass(slots=True)
class _Search:
    """One question's state. `low` and `high` index `places` while a span is looked for."""

    question: Question
    prompt: Prompt
    sampling: SamplingParams
    deferred: list[int] = field(default_factory=list)
    output: RequestOutput | None = None
    places: list[int] = field(default_factory=list)
    low: int = 0
    high: int = 0
    done: bool = False

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2


class Oracle:
    """Answers questions with as few spans of the LLM's as labels allow.

    Args:
        engine: of a pair with one vocabulary.
        task: grades texts.
        routing: granularity and limits of the routed text; its router is the oracle's own.

    Raises:
        UsageError: the pair's two tokenizers differ, or texts are sampled.
    """

    def __init__(self, engine: Engine, task: Task, routing: RoutingParams) -> None:
        if not engine.pair.same_vocabulary:
            raise UsageError("the oracle needs a pair with one vocabulary")
        self.engine, self.task, self.routing = engine, task, routing

    def answer(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Prompt],
        sampling: Sequence[SamplingParams],
    ) -> list[RequestOutput]:
        """The routed texts, in the order of the questions."""
        if any(one.temperature for one in sampling):
            raise UsageError("the oracle compares greedy continuations: set temperature to 0")
        searches = [
            _Search(question, prompt, one)
            for question, prompt, one in zip(questions, prompts, sampling, strict=True)
        ]
        active = searches
        for _ in range(_MAX_SPANS):
            self._write(active)
            active = [search for search in active if not search.done]
            if not active:
                break
            self._find_spans(active)
            active = [search for search in active if not search.done]
        outputs = [search.output for search in searches]
        assert all(outputs)
        return [output for output in outputs if output is not None]

    def _write(self, searches: list[_Search]) -> None:
        """Route with the spans found so far; done where the answer is right."""
        routing = [
            replace(self.routing, router=ReplayRouter(s.deferred), threshold=None, trace=True)
            for s in searches
        ]
        outputs = self.engine.generate(
            [s.prompt for s in searches],
            [s.sampling for s in searches],
            routing,
        )
        for search, output in zip(searches, outputs, strict=True):
            search.output = output
            search.done = self.task.grade(search.question, output.text).grade == "right"
            fixed = search.deferred[-1] if search.deferred else -1
            search.places = [
                d.position
                for d in output.trace or ()
                if d.score is not None and d.position > fixed and d.position not in search.deferred
            ]
            search.low, search.high = 0, len(search.places)

    def _find_spans(self, searches: list[_Search]) -> None:
        """Hand over, for each question, the last span before which the LLM still gets there."""
        for search in searches:
            if not search.places:
                search.done = True
        open_ = [search for search in searches if not search.done]
        # places[low] can be saved and places[high] cannot; -1 in `low` until one was seen to be.
        for search, saved in zip(open_, self._saved(open_, [0] * len(open_)), strict=True):
            search.done = not saved
        while open_ := [s for s in open_ if not s.done and s.high - s.low > 1]:
            verdicts = self._saved(open_, [s.middle for s in open_])
            for search, saved in zip(open_, verdicts, strict=True):
                if saved:
                    search.low = search.middle
                else:
                    search.high = search.middle
        for search in searches:
            if not search.done:
                search.deferred.append(search.places[search.low])

    def _saved(self, searches: list[_Search], indices: list[int]) -> list[bool]:
        """Whether the LLM, writing from a place on, ends at the right answer."""
        if not searches:
            return []
        prompts: list[Prompt] = []
        sampling, prefixes = [], []
        for search, index in zip(searches, indices, strict=True):
            output, place = search.output, search.places[index]
            assert output is not None
            prefixes.append(output.token_ids[:place])
            prompts.append([*output.prompt_token_ids, *prefixes[-1]])
            limit = search.sampling.max_tokens
            left = None if limit is None else max(1, limit - place)
            sampling.append(replace(search.sampling, max_tokens=left))
        outputs = self.engine.generate(prompts, sampling, RoutingParams(router="llm"))
        tokenizer = self.engine.pair.slm.tokenizer
        verdicts = []
        for search, prefix, output in zip(searches, prefixes, outputs, strict=True):
            text = str(tokenizer.decode(prefix + output.token_ids, skip_special_tokens=False))
            verdicts.append(self.task.grade(search.question, text).grade == "right")
        return verdicts
