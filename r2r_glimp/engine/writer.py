"""Writer: tokens onto timelines, and what follows from them.

    token ──▶ timeline, text, policy ──▶ stop? ──▶ blocks back
                                    └──▶ TokenEvent, FinishEvent

Knows nothing about logits: who chose a token, and why, is decided before it comes here.
"""

import logging
from collections.abc import Container
from dataclasses import replace
from typing import Literal

from r2r_glimp.core import (
    Decision,
    Event,
    FinishEvent,
    FinishReason,
    Model,
    TokenEvent,
    TokenLogprob,
)
from r2r_glimp.engine.scheduler import Scheduler
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.routing.tags import ThinkTags

log = logging.getLogger(__name__)


class Writer:
    """Writes for all sequences, ends them, and keeps the events until they are taken.

    Args:
        pair: whose tokenizers spell text that must be written for a model.
        tags: the pair's think tags, None without.
        scheduler: takes out sequences that ended.
        room: tokens a timeline may have, for each model.
    """

    def __init__(
        self, pair: ModelPair, tags: ThinkTags | None, scheduler: Scheduler, room: list[int]
    ) -> None:
        self.pair = pair
        self.tags = tags
        self.scheduler = scheduler
        self.room = room
        self._events: list[Event] = []
        self._warned_undelimited = False

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def drop_events(self, request_ids: Container[str]) -> None:
        """Nobody waits for the events of these requests any more."""
        self._events = [e for e in self._events if e.request_id not in request_ids]

    def append(
        self, sequence: Sequence, model: Model, token: int, logprob: TokenLogprob | None = None
    ) -> None:
        """Write one token: to the timeline, the text, the policy and the event stream; then check
        the stops."""
        position = len(sequence.tokens)
        sequence.stats.switches += bool(sequence.sources) and sequence.sources[-1] is not model
        sequence.tokens.append(token)
        sequence.sources.append(model)
        if model is Model.LLM:
            sequence.stats.llm_tokens += 1
        else:
            sequence.stats.slm_tokens += 1
        if sequence.logprobs is not None and logprob is not None:
            sequence.logprobs.append(logprob)
        if sequence.trace is not None:
            known = sequence.trace.get(position) or Decision(position, model.label, token)
            phase: Literal["thinking", "answer"] = (
                "answer" if sequence.policy.section == "answer" else "thinking"
            )
            sequence.trace[position] = replace(known, token=token, phase=phase)
        sequence.timelines[model].tokens.append(token)

        reason = self._read(sequence, model, token)
        if reason:
            self._end(sequence, reason)
        self._events.append(
            TokenEvent(
                sequence.request_id,
                sequence.index,
                position,
                token,
                model.label,
                sequence.take_readable(),
                logprob,
                sequence.score,
            )
        )
        sequence.score = None
        if reason:
            self._tell_end(sequence)

    def close_thinking(self, sequence: Sequence) -> None:
        """Close the thinking by force: write the closing tag, or end a text that has none."""
        sequence.looped = sequence.policy.repeated
        if self.tags is None:
            self.finish(sequence, "length")
            return
        self.sync(sequence, Model.SLM)
        text = sequence.policy.closing_text()
        for token in self.pair.slm.tokenizer.encode(text, add_special_tokens=False):
            sequence.stats.forced_tokens += 1
            self.append(sequence, Model.SLM, token)
            if sequence.finish_reason is not None:
                return

    def sync(self, sequence: Sequence, model: Model) -> None:
        """With two tokenizers: give a model's timeline the text the other one wrote since it last
        ran."""
        timeline = sequence.timelines[model]
        if sequence.shared or timeline.num_chars == len(sequence.written):
            return
        text = sequence.written.since(timeline.num_chars)
        ids = self.pair[model].tokenizer.encode(text, add_special_tokens=False)
        timeline.tokens += ids
        timeline.num_chars = len(sequence.written)
        for token in ids:
            sequence.detokenizers[model].append(token)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a completion and give its blocks back."""
        self._end(sequence, reason)
        self._tell_end(sequence)

    def fail(self, sequence: Sequence, message: str) -> None:
        """End one completion by an error of its own; its blocks are not reused by content."""
        sequence.error = message
        log.error("%s: %s", sequence.request_id, message)
        self.finish(sequence, "error")

    def _read(self, sequence: Sequence, model: Model, token: int) -> FinishReason | None:
        """Advance text and policy over a token just written; why the completion ends, if it
        does."""
        sampling = sequence.sampling
        if token in sampling.stop_token_ids or (
            token in sequence.eos_ids[model] and not sampling.ignore_eos
        ):
            return "stop"
        detokenizer = sequence.detokenizers[model]
        text = detokenizer.append(token)
        sequence.written.append(text)
        sequence.timelines[model].num_chars = len(sequence.written)
        sequence.policy.append(model, text, complete=detokenizer.complete)
        sequence.end = sequence.find_stop(len(text))
        if sequence.end is not None:
            return "stop"
        full = any(len(sequence.timelines[m].tokens) >= self.room[m] for m in Model)
        return "length" if full or len(sequence.tokens) >= sequence.max_tokens else None

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.looped and reason in ("stop", "length"):
            reason = "repetition"
        elif sequence.stats.llm_unavailable and reason in ("stop", "length"):
            reason = "llm_unavailable"
        if sequence.pending is not None:
            sequence.pending.future.cancel()
        if sequence.end is None:
            last = sequence.sources[-1] if sequence.sources else Model.SLM
            sequence.written.append(sequence.detokenizers[last].flush())
        sequence.finish_reason = reason
        self.scheduler.remove(sequence, forget=reason == "error")
        self._warn_undelimited(sequence)

    def _tell_end(self, sequence: Sequence) -> None:
        self._events.append(FinishEvent(sequence.request_id, sequence.index, sequence.output()))

    def _warn_undelimited(self, sequence: Sequence) -> None:
        policy = sequence.policy
        limit = policy.route.params.max_step_tokens
        if (
            policy.route.granularity == "step"
            and policy.num_thinking >= limit
            and not policy.num_delimiters
        ):
            if not self._warned_undelimited:
                log.warning(
                    "%s thought for %d tokens without a step delimiter (%s): steps were cut "
                    "every %d tokens; choose another delimiter for this model",
                    sequence.request_id, policy.num_thinking, policy.route.params.delimiter, limit,
                )  # fmt: skip
            self._warned_undelimited = True
