"""Sequence: the state of one completion while it runs."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from r2r_glimp.core import (
    Decision,
    FinishReason,
    Model,
    RequestOutput,
    SamplingParams,
    Stats,
    Timeline,
    TokenLogprob,
)
from r2r_glimp.engine.detokenizer import Detokenizer
from r2r_glimp.engine.text import Text
from r2r_glimp.remote.api import Ask, Reply
from r2r_glimp.routing.policy import Policy, Turn


@dataclass(slots=True)
class Pending:
    """A turn that a server was asked for."""

    model: Model
    turn: Turn
    future: Future[Reply]
    ask: Ask


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of one request.

    `timelines[m]` is what model m reads: the same object for both models unless their tokenizers
    differ. `0 <= num_computed[m] <= len(timelines[m].tokens)`; the difference is model m's work.
    """

    request_id: str
    index: int
    arrival: int  # order of admission; the newest is preempted first
    seed: int
    sampling: SamplingParams
    policy: Policy
    timelines: tuple[Timeline, Timeline]
    detokenizers: tuple[Detokenizer, Detokenizer]
    eos_ids: tuple[frozenset[int], frozenset[int]]
    max_tokens: int
    planes: tuple[Model, ...] = tuple(Model)  # the models whose KV is here
    runs: bool = False  # admitted, and neither preempted nor ended since
    pending: Pending | None = None
    num_computed: list[int] = field(default_factory=lambda: [0, 0])
    tokens: list[int] = field(default_factory=list)  # generated, ids of whoever wrote them
    sources: list[Model] = field(default_factory=list)
    written: Text = field(default_factory=Text)  # without the end-of-text token
    num_emitted: int = 0  # characters already streamed
    end: int | None = None  # where a stop string cuts the text
    ticks_waiting: int = 0  # for the LLM
    num_drafts: int = 0  # last tokens of the timeline that the LLM has not confirmed
    draft_length: int = 0  # how many to try next, learnt from how many were right
    draft_misses: int = 0  # times in a row that not even the first was right
    draft_pause: int = 0  # passes of the LLM without drafts, after misses
    score: float | None = None  # of the decision taken at the next token, if one was
    looped: bool = False  # the repetition guard closed the thinking
    finish_reason: FinishReason | None = None
    error: str | None = None
    stats: Stats = field(default_factory=Stats)
    logprobs: list[TokenLogprob] | None = None
    trace: dict[int, Decision] | None = None  # by position
    started: float = field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        """All that is written; made anew from its pieces at every call."""
        return str(self.written)

    @property
    def shared(self) -> bool:
        return self.timelines[0] is self.timelines[1]

    @property
    def traces_llm(self) -> bool:
        """Whether the LLM's choices over what it catches up on are recorded."""
        return self.trace is not None and self.shared

    @property
    def distinct_timelines(self) -> list[tuple[Timeline, Model]]:
        """Each timeline that has KV here once, with a model that reads it."""
        models = self.planes[:1] if self.shared else self.planes
        return [(self.timelines[m], m) for m in models]

    def drop_drafts(self) -> list[int]:
        """Take the drafts off the timeline; cursors and KV behind its end are the caller's."""
        tokens = self.timelines[Model.SLM].tokens
        drafts = tokens[len(tokens) - self.num_drafts :]
        del tokens[len(tokens) - self.num_drafts :]
        self.num_drafts = 0
        return drafts

    def num_outstanding(self, model: Model) -> int:
        """Tokens a model has still to compute."""
        return len(self.timelines[model].tokens) - self.num_computed[model]

    def find_stop(self, num_new: int) -> int | None:
        """Where the earliest stop string begins, if one was completed by the last `num_new`
        characters."""
        starts = []
        for stop in self.sampling.stop:
            first = max(0, len(self.written) - num_new - len(stop) + 1)
            found = self.written.since(first).find(stop)
            if found >= 0:
                starts.append(first + found)
        return min(starts, default=None)

    def take_readable(self) -> str:
        """Text that can be streamed now: a possible beginning of a stop string is held back until
        it is decided."""
        end = len(self.written) if self.end is None else self.end
        if self.finish_reason is None:
            end -= max((_overlap(self.written, stop) for stop in self.sampling.stop), default=0)
        if end <= self.num_emitted:
            return ""
        text = self.written.since(self.num_emitted)[: end - self.num_emitted]
        self.num_emitted = end
        return text

    def output(self) -> RequestOutput:
        assert self.finish_reason is not None
        timeline = self.timelines[Model.SLM]
        self.stats.elapsed_s = time.monotonic() - self.started
        sources: list[Literal["slm", "llm"]] = [source.label for source in self.sources]
        return RequestOutput(
            request_id=self.request_id,
            index=self.index,
            prompt_token_ids=timeline.tokens[: timeline.num_prompt_tokens],
            token_ids=self.tokens,
            text=self.text[: self.end],
            sources=sources,
            finish_reason=self.finish_reason,
            stats=self.stats,
            logprobs=self.logprobs,
            trace=None if self.trace is None else [self.trace[p] for p in sorted(self.trace)],
            error=self.error,
        )


def _overlap(text: Text, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    end = text.since(len(text) - len(stop) + 1)
    return next((n for n in range(len(end), 0, -1) if end.endswith(stop[:n])), 0)
