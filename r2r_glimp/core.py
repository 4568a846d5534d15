"""The nouns everything else shares: parameters of a request, its timeline, what comes out, and the
errors.

Imports nothing but the standard library: no torch, no I/O.

    timeline   prompt tokens | tokens written so far, by either model
                                              ▲                    ▲
               num_computed[LLM] ─────────────┘                    │     work of model m is
               num_computed[SLM] ──────────────────────────────────┘     tokens[num_computed[m]:]
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from r2r_glimp.routing.routers import Router

Granularity = Literal["token", "step"]
AnswerBy = Literal["slm", "llm", "router"]
FinishReason = Literal["stop", "length", "abort", "error", "repetition", "llm_unavailable"]


class R2RGlimpError(Exception):
    """Root of the tree. The message is one line: what, where, what to do."""


class UsageError(R2RGlimpError):
    """The caller asked for something impossible or contradictory (exit code 2, HTTP 400)."""


class DataError(R2RGlimpError):
    """Input rows, files or prompts that cannot be used (exit code 2, HTTP 400)."""


class CheckpointError(R2RGlimpError):
    """A model, router or adapter that is missing, broken, unsafe or does not fit (exit code 2)."""


class EngineError(R2RGlimpError):
    """Something failed while computing: NaN logits, out of memory (exit code 1, HTTP 500)."""


class Model(IntEnum):
    """Which of the two models; indexes cursors, planes and runners."""

    SLM = 0
    LLM = 1

    @property
    def label(self) -> Literal["slm", "llm"]:
        return "llm" if self else "slm"


def _require(ok: bool, name: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UsageError(f"{name}={value!r} is out of range: {wanted}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is picked from a model's distribution; honoured for both models alike.

    Args:
        temperature: 0 is greedy; the default.
        top_p: keep the smallest set of tokens whose probability reaches this.
        top_k: keep the k likeliest tokens; 0 keeps all.
        min_p: drop tokens below this share of the likeliest token's probability.
        seed: same seed, same text, whatever else is in the batch; None draws one.
        max_tokens: generated tokens at most; None is whatever fits the context.
        stop: strings that end the text; the text is cut before them.
        stop_token_ids: further ids that end the text.
        ignore_eos: go on after the end-of-text token.
        logprobs: None, or how many alternatives to report beside each token (0: the token alone).
        n: completions per prompt.

    Raises:
        UsageError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 512
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        number = _is_number
        _require(
            number(self.temperature) and 0 <= self.temperature <= 10,
            "temperature",
            self.temperature,
            "0 to 10",
        )
        _require(
            number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1"
        )
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**64),
            "seed",
            self.seed,
            "0 to 2**64 - 1",
        )
        _require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens", self.max_tokens, "1 or more",
        )  # fmt: skip
        _require(
            all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty strings"
        )
        _require(
            all(_is_int(t) for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "integers",
        )
        _require(
            self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= 20),
            "logprobs", self.logprobs, "0 to 20",
        )  # fmt: skip
        _require(_is_int(self.n) and 1 <= self.n <= 128, "n", self.n, "1 to 128")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingParams:
    """Who writes what.

    Args:
        granularity: how much text one decision hands over, a token or a reasoning step. None: the
            router's own, or `token`.
        router: a router's name or a loaded router; None is the engine's.
        threshold: a score above it defers the span to the LLM; None is the router's own.
        answer_by: who writes what follows the thinking. None: the LLM at step granularity
            (GlimpRouter, section 3), the router at token granularity.
        delimiter: what ends a step: `blank_line`, `newline`, `sentence` or `regex:PATTERN`.
        max_step_tokens: a longer step is cut here and a new decision is taken; nothing is spliced
            in.
        max_thinking_tokens: close the thinking after this many tokens and go to the answer.
        max_llm_share: hard cap on LLM-written tokens / generated tokens, kept at every position.
        repetition_guard: escalate a repeating sequence of steps to the LLM once, then close the
            thinking. None: on, save for the `slm` and `llm` baselines.
        trace: record every decision, and the LLM's own choice at each position it catches up over.
        speculate: where the LLM writes more than one token, the SLM drafts up to so many for it to
            check in one pass; the text stays the same. 0: off. Not together with `trace`.

    Raises:
        UsageError: a value is out of range.
    """

    granularity: Granularity | None = None
    router: str | Router | None = None
    threshold: float | None = None
    answer_by: AnswerBy | None = None
    delimiter: str = "blank_line"
    max_step_tokens: int = 512
    max_thinking_tokens: int | None = None
    max_llm_share: float | None = None
    repetition_guard: bool | None = None
    trace: bool = False
    speculate: int = 0

    def __post_init__(self) -> None:
        _require(
            self.granularity in (None, "token", "step"),
            "granularity",
            self.granularity,
            "token or step",
        )
        _require(
            self.answer_by in (None, "slm", "llm", "router"),
            "answer_by",
            self.answer_by,
            "slm, llm or router",
        )
        _require(
            self.threshold is None or _is_number(self.threshold),
            "threshold",
            self.threshold,
            "a finite number",
        )
        _require(
            _is_int(self.max_step_tokens) and self.max_step_tokens >= 1,
            "max_step_tokens", self.max_step_tokens, "1 or more",
        )  # fmt: skip
        _require(
            self.max_thinking_tokens is None
            or (_is_int(self.max_thinking_tokens) and self.max_thinking_tokens >= 1),
            "max_thinking_tokens", self.max_thinking_tokens, "1 or more",
        )  # fmt: skip
        _require(
            self.max_llm_share is None
            or (_is_number(self.max_llm_share) and 0 <= self.max_llm_share <= 1),
            "max_llm_share", self.max_llm_share, "0 to 1",
        )  # fmt: skip
        _require(
            _is_int(self.speculate) and 0 <= self.speculate <= 64,
            "speculate", self.speculate, "0 to 64",
        )  # fmt: skip
        if self.speculate and self.trace:
            raise UsageError("trace and speculate exclude each other: drop one of them")


@dataclass(slots=True)
class Timeline:
    """The tokens one tokenizer sees of a request, and the KV blocks that hold them.

    Both models of a pair share one timeline; a pair with two tokenizers has one each, of the same
    text.
    """

    tokens: list[int]
    num_prompt_tokens: int
    # Block ids, in order; an array, so that a kernel reads it where it lies.
    blocks: array[int] = field(default_factory=lambda: array("i"))
    hashes: list[bytes] = field(default_factory=list)  # chained, one per full block seen so far
    num_chars: int = 0  # of the generated text, how much these tokens spell


@dataclass(frozen=True, slots=True)
class Decision:
    """What is known of one generated position, counted from 0: the decision taken there, what the
    LLM would have done.

    `score` is None where no decision was due. `llm_token` is the LLM's own greedy choice where a
    catch-up pass told it for free: equal to `token` means identical. `slm_token` is the SLM's
    proposal; `token` is what was written.
    """

    position: int
    source: Literal["slm", "llm"]
    token: int
    score: float | None = None
    threshold: float | None = None
    deferred: bool = False
    capped: bool = False
    slm_token: int | None = None
    llm_token: int | None = None
    phase: Literal["thinking", "answer"] = "thinking"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (nats, temperature 1) of a token under the model that wrote it, with likelier
    alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Stats:
    """What one request cost. Counts are tokens unless named otherwise."""

    slm_tokens: int = 0
    llm_tokens: int = 0
    switches: int = 0
    decisions: int = 0
    deferrals: int = 0
    forced_tokens: int = 0
    slm_computed: int = 0
    llm_computed: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    draft_accepted: int = 0
    llm_unavailable: int = 0  # spans that the SLM wrote because the LLM's server did not
    elapsed_s: float = 0.0

    @property
    def llm_share(self) -> float:
        """LLM-written tokens / generated tokens."""
        return self.llm_tokens / max(1, self.slm_tokens + self.llm_tokens)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished completion. `sources[i]` says who wrote `token_ids[i]`."""

    request_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    sources: list[Literal["slm", "llm"]]
    finish_reason: FinishReason
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
    trace: list[Decision] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token was appended. `text` is what became readable by it: empty in the middle of a
    character. `score` is the router's where a decision was taken here, else None."""

    request_id: str
    index: int
    position: int
    token_id: int
    source: Literal["slm", "llm"]
    text: str
    logprob: TokenLogprob | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """A completion ended; nothing follows for it."""

    request_id: str
    index: int
    output: RequestOutput


Event = TokenEvent | FinishEvent
Messages = SequenceABC[dict[str, str]]
Prompt = str | Messages | SequenceABC[int]
