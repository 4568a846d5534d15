"""Policy: who writes the next token of one request, read off the text so far.

A small state machine fed with text; knows nothing about token ids, tensors or models.

    preamble ──<think>──▶ thinking: step, step, … ──</think>──▶ answer
       │  whoever opens        │ a decision per token or step       │ by slm, llm or router
       └──── other text ───────┘                                    └─ until the text ends

A decision is due whenever nobody owns the current span. `turn` says who writes next; `decide`
records a score's verdict; `append` advances over what was written.
"""

from dataclasses import dataclass
from enum import Enum

from r2r_glimp.core import AnswerBy, Granularity, Model, RoutingParams, UsageError
from r2r_glimp.routing.routers import Router
from r2r_glimp.routing.steps import MAX_PERIOD, delimiter_pattern, ends_step, repeats
from r2r_glimp.routing.tags import Section, ThinkTags

MAX_OPENING_TOKENS = 8


class Turn(Enum):
    """Whose turn it is: a model's, or the SLM's with a decision on its proposal."""

    SLM = "slm"
    LLM = "llm"
    DECIDE = "decide"


@dataclass(frozen=True, slots=True)
class Route:
    """A request's routing with every default filled in."""

    router: Router
    granularity: Granularity
    threshold: float
    answer_by: AnswerBy
    repetition_guard: bool
    params: RoutingParams

    @classmethod
    def resolve(
        cls,
        params: RoutingParams,
        router: Router,
        *,
        shared: bool,
        apart: str = "the tokenizers of this pair differ",
    ) -> "Route":
        """Fill in what a request left open; `shared` says whether both models read the same token
        ids, `apart` why they do not.

        Raises:
            UsageError: the router is made for the other granularity, the pair's two tokenizers rule
                out token granularity, or the delimiter is not valid.
        """
        granularity = params.granularity or router.granularity or ("token" if shared else "step")
        if router.granularity not in (None, granularity):
            raise UsageError(
                f"router {router.name!r} was trained for granularity {router.granularity}, "
                f"not {granularity}: drop --granularity or choose another router"
            )
        delimiter_pattern(params.delimiter)
        baseline = router.constant is not None
        if granularity == "token" and not shared and not baseline:
            raise UsageError(
                f"token granularity needs one vocabulary, and {apart}: use --granularity step"
            )
        answer_by = params.answer_by or ("router" if baseline else default_answer_by(granularity))
        guard = not baseline if params.repetition_guard is None else params.repetition_guard
        threshold = router.threshold(granularity) if params.threshold is None else params.threshold
        return cls(router, granularity, threshold, answer_by, guard, params)


def default_answer_by(granularity: Granularity) -> AnswerBy:
    """Who writes what follows the thinking where a request does not say."""
    return "llm" if granularity == "step" else "router"


class Policy:
    """The routing state of one request.

    Args:
        route: its resolved routing.
        tags: the pair's think tags, None without.
        section: where the prompt leaves the thinking.
    """

    def __init__(self, route: Route, tags: ThinkTags | None, section: Section) -> None:
        self.route = route
        self.tags = tags
        self.section: Section = section
        self.num_generated = 0
        self.num_llm = 0
        self.num_thinking = 0
        self.num_delimiters = 0
        self.repeated = False  # the guard closed the thinking
        self.close_due = False  # the thinking must be closed now, by force
        self.capped = False  # the last verdict was the cap's, not the router's
        self._owner: Model | None = None
        self._holds_step = (
            False  # the owner keeps the span to the step's end, also at token granularity
        )
        self._step_text = ""
        self._step_tokens = 0
        self._opening = MAX_OPENING_TOKENS
        self._steps: list[str] = []
        self._escalated = False
        self._pattern = delimiter_pattern(route.params.delimiter)
        if section == "answer":
            self._enter_answer()

    @property
    def turn(self) -> Turn:
        """Who writes the next token."""
        owner = self.route.router.constant if self._owner is None else self._owner
        if owner is None:
            return Turn.DECIDE
        return Turn.LLM if owner is Model.LLM and self._cap_allows() else Turn.SLM

    @property
    def span_tokens(self) -> int | None:
        """Tokens that the owner of the current span writes at most; None to the end of the text."""
        if self._owner is None or (self.section == "answer" and self._holds_step):
            return None  # a baseline, or the answer
        if self.route.granularity == "token" and not self._holds_step:
            return 1
        if self.section == "answer":
            return None
        return max(1, self.route.params.max_step_tokens - self._step_tokens)

    def ends_span(self, text: str) -> bool:
        """Whether text that follows would end the current step."""
        if self._owner is None or self.section == "answer":
            return False
        text = self._step_text + text
        closes = self.tags is not None and self.tags.close in text
        return closes or ends_step(text, self._pattern)

    def hand_back(self) -> None:
        """The LLM did not write its span: the SLM does."""
        self._owner = Model.SLM

    @property
    def in_opening(self) -> bool:
        """Whether the next proposal might only open a section; `is_opening` tells."""
        return self.route.granularity == "step" and self._opening > 0

    def is_opening(self, proposal: str) -> bool:
        """Whether the SLM's proposed text only opens a section, and so is no place for a decision.

        At step granularity the tag itself and the white space after a tag belong to nobody's step:
        the entropy there says nothing about what follows.
        """
        if not self.in_opening:
            return False
        text = (self._step_text + proposal).lstrip()
        if self.section == "preamble" and self.tags is not None:
            return self.tags.open.startswith(text) or text.startswith(self.tags.open)
        return not text

    def decide(self, score: float) -> bool:
        """Take the decision on the SLM's proposal: True defers the span to the LLM."""
        wanted = self.route.router.defers(score, self.route.threshold)
        self.capped = wanted and not self._cap_allows()
        deferred = wanted and not self.capped
        self._owner = Model.LLM if deferred else Model.SLM
        return deferred

    def append(self, source: Model, text: str, *, complete: bool = True) -> None:
        """Advance over one written token.

        Args:
            source: who wrote it.
            text: what became readable by it.
            complete: False in the middle of a character; a step is never cut there.
        """
        self.num_generated += 1
        self.num_llm += source is Model.LLM
        if self.section != "answer" or self._opening:  # an answer is looked at while it opens
            self._step_text += text
        if self.section == "answer":
            self._skip_opening()
        elif self.section == "preamble":
            self._append_preamble()
        else:
            self._append_thinking(complete)
        if self.route.granularity == "token" and not self._holds_step:
            self._owner = None
        elif self._owner is Model.LLM and not self._cap_allows():
            # The cap holds at every position; once it bites, the SLM finishes the span.
            self._owner = Model.SLM

    def closing_text(self) -> str:
        """What closes the thinking by force; call when `close_due`."""
        assert self.tags is not None
        gap = "" if not self._step_text or self._step_text.endswith("\n") else "\n\n"
        return f"{gap}{self.tags.close}\n\n"

    def _cap_allows(self) -> bool:
        cap = self.route.params.max_llm_share
        return cap is None or self.num_llm + 1 <= cap * (self.num_generated + 1)

    def _skip_opening(self) -> None:
        """Count an opening token; any content ends the opening."""
        if self._opening:
            self._opening = 0 if self._step_text.strip() else self._opening - 1

    def _append_preamble(self) -> None:
        assert self.tags is not None
        text = self._step_text.lstrip()
        if text.startswith(self.tags.open):
            self.section = "thinking"
            self._begin_step(text.removeprefix(self.tags.open), opening=True)
        elif text and not self.tags.open.startswith(text):
            # The model thinks without opening its tag: what it wrote so far is the first step.
            self.section = "thinking"
            self._append_thinking(complete=True)
        else:
            self._opening = max(0, self._opening - 1)

    def _append_thinking(self, complete: bool) -> None:
        self.num_thinking += 1
        self._step_tokens += 1
        self._skip_opening()
        if self.tags is not None and self.tags.close in self._step_text:
            self._enter_answer()
            return
        delimited = ends_step(self._step_text, self._pattern)
        self.num_delimiters += delimited
        if delimited or (complete and self._step_tokens >= self.route.params.max_step_tokens):
            self._end_step()
        limit = self.route.params.max_thinking_tokens
        if limit is not None and self.num_thinking >= limit and complete:
            self.close_due = True

    def _end_step(self) -> None:
        self._steps = [*self._steps, self._step_text.strip()][-2 * MAX_PERIOD :]
        self._begin_step("")
        if self.route.repetition_guard and repeats(self._steps):
            if self._escalated:
                self.repeated = self.close_due = True
            else:
                self._escalated = self._holds_step = True
                self._owner = Model.LLM

    def _begin_step(self, text: str, *, opening: bool = False) -> None:
        self._step_text = text
        self._step_tokens = 0
        self._opening = MAX_OPENING_TOKENS if opening and not text.strip() else 0
        self._owner = None
        self._holds_step = False

    def _enter_answer(self) -> None:
        assert self.tags is not None
        self.section = "answer"
        self.close_due = False
        self._begin_step(self._step_text.rpartition(self.tags.close)[2], opening=True)
        if self.route.answer_by != "router":
            self._owner = Model(self.route.answer_by == "llm")
            self._holds_step = True
