"""The engine: many requests, two models, one tick at a time.

A tick: admit; run the SLM over every row whose turn it is, prompts chunked under a token budget;
score the rows that stand at a decision point; run the LLM over the rows that wait for it; append,
check stops, emit
events. There are no
phases: prefill, decode and catch-up are all "model m computes `tokens[num_computed[m]:]`, look at
    the last row".
"""

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import (
    Decision,
    EngineError,
    Event,
    FinishEvent,
    FinishReason,
    Model,
    Prompt,
    RequestOutput,
    RoutingParams,
    SamplingParams,
    Timeline,
    TokenEvent,
    TokenLogprob,
    UsageError,
)
from r2r_glimp.engine.detokenizer import Detokenizer
from r2r_glimp.engine.memory import num_blocks_for, parse_bytes
from r2r_glimp.engine.prompts import EncodedPrompt, encode_prompt, prompt_tail
from r2r_glimp.engine.runner import ModelRunner, Rows
from r2r_glimp.engine.sampling import Stream, sample, token_logprob, uniform
from r2r_glimp.engine.scheduler import Scheduler
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.kv.manager import KVManager
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.routing.policy import Policy, Route, Turn
from r2r_glimp.routing.routers import Router, named_router
from r2r_glimp.routing.signals import Signals
from r2r_glimp.routing.tags import find_tags, section_of

log = logging.getLogger(__name__)


class Engine:
    """Generates with a pair of models, routed per token or per step.

    Args:
        pair: the two models.
        router: default router of requests that name none: a name or a loaded router.
        kv_memory: memory for the KV of both models together: `"1GiB"`, or bytes.
        max_batch: sequences that run at once.
        max_batch_tokens: tokens one forward pass computes at most; longer prompts are chunked.
        llm_min_batch: the LLM runs when this many rows wait for it,
        llm_max_wait: or when one has waited this many ticks, or when the SLM has nothing to do.
        prefix_cache: reuse the KV of earlier requests with the same beginning.
        kernels: "auto", the fastest there is here, or "torch", the reference they are checked
            against. On the CPU, "auto" exchanges layers of the pair's models for good.

    Raises:
        CheckpointError: a model cannot run under paged attention.
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        pair: ModelPair,
        *,
        router: str | Router = "entropy",
        kv_memory: str | int = "1GiB",
        max_batch: int = 32,
        max_batch_tokens: int = 2048,
        llm_min_batch: int = 1,
        llm_max_wait: int = 4,
        prefix_cache: bool = True,
        kernels: str = "auto",
    ) -> None:
        if min(max_batch, max_batch_tokens, llm_min_batch) < 1:
            raise UsageError("max_batch, max_batch_tokens and llm_min_batch must be 1 or more")
        self.pair = pair
        self.llm_min_batch = llm_min_batch
        self.llm_max_wait = llm_max_wait
        self.shared = pair.same_vocabulary
        # One runner each, unless both roles are played by one loaded model.
        slm = ModelRunner(pair.slm, kernels)
        self.runners = (slm, slm if pair.llm is pair.slm else ModelRunner(pair.llm, kernels))
        for model in Model:
            log.info("%s: %s", model.name, self.runners[model].paths)
        self._named_routers: dict[str, Router] = {}
        self.router = self._load_router(router)
        bytes_per_token = sum(runner.kv_bytes_per_token for runner in self.runners)
        num_blocks = num_blocks_for(parse_bytes(kv_memory), bytes_per_token)
        for runner in self.runners:
            runner.allocate(num_blocks)
        self.kv = KVManager(num_blocks, shared=self.shared, prefix_cache=prefix_cache)
        log.info("KV of %s holds %s tokens of both models", kv_memory, f"{self.kv.capacity:,}")
        self.tags = find_tags(pair.slm.tokenizer.get_vocab())
        self.scheduler = Scheduler(self.kv, max_batch=max_batch, max_batch_tokens=max_batch_tokens)
        self._events: list[Event] = []
        # Tokens a timeline may have, for each model; a config tells its context only slowly.
        self.room = [min(self.pair[m].context_length, self.kv.capacity) for m in Model]
        self._arrivals = 0
        self._warned_undelimited = False

    # ------------------------------------------------------------------ requests

    def encode(
        self, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None
    ) -> EncodedPrompt:
        """The ids that both models read; changes nothing, so any thread may call it.

        Args:
            prompt: as in `add_request`.
            template_kwargs: further variables of the chat template.

        Raises:
            UsageError, DataError: the prompt cannot be encoded.
        """
        return EncodedPrompt(
            *encode_prompt(
                prompt,
                self.pair,
                self.tags,
                shared=self.shared,
                template_kwargs=template_kwargs,
            )
        )

    def add_request(
        self,
        prompt: Prompt | EncodedPrompt,
        sampling: SamplingParams | None = None,
        routing: RoutingParams | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue a request: `sampling.n` completions of one prompt.

        Args:
            prompt: text, chat messages (the pair's chat template is applied), token ids, or what
                `encode` made of one of them.

        Returns:
            The request's id; its completions are told apart by `index`.

        Raises:
            UsageError, DataError: the request cannot run; nothing is queued.
        """
        sampling, routing = sampling or SamplingParams(), routing or RoutingParams()
        route = Route.resolve(
            routing, self._load_router(routing.router or self.router), shared=self.shared
        )
        if routing.speculate and not self.shared:
            raise UsageError(
                "speculate needs one vocabulary, and the tokenizers of this pair differ"
            )
        encoded = prompt if isinstance(prompt, EncodedPrompt) else self.encode(prompt)
        prompts = (encoded.slm, encoded.llm)
        self._check_room(prompts, sampling)
        if request_id is None:
            request_id = f"request-{self._arrivals}"
        room = min(self.kv.capacity, *(self.pair[m].context_length for m in Model))
        longest = max(map(len, prompts))
        max_tokens = (
            room - longest
            if sampling.max_tokens is None
            else min(sampling.max_tokens, room - longest)
        )
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        tail = prompt_tail(prompts[Model.SLM], self.pair.slm.tokenizer, self.tags)
        for index in range(sampling.n):
            timelines = [Timeline(list(ids), len(ids)) for ids in prompts]
            tokenizers = [self.pair[m].tokenizer for m in Model]
            detokenizers = [Detokenizer(t, ids) for t, ids in zip(tokenizers, prompts, strict=True)]
            if self.shared:
                timelines[1], detokenizers[1] = timelines[0], detokenizers[0]
            sequence = Sequence(
                request_id=request_id,
                index=index,
                arrival=self._arrivals,
                seed=(seed + index * 0x9E3779B97F4A7C15) % 2**64,
                sampling=sampling,
                policy=Policy(route, self.tags, section_of(tail, self.tags)),
                timelines=(timelines[0], timelines[1]),
                detokenizers=(detokenizers[0], detokenizers[1]),
                eos_ids=(self.pair.slm.eos_token_ids, self.pair.llm.eos_token_ids),
                max_tokens=max_tokens,
                logprobs=None if sampling.logprobs is None else [],
                trace={} if routing.trace else None,
                draft_length=routing.speculate,
            )
            self._arrivals += 1
            self.scheduler.waiting.append(sequence)
        return request_id

    def abort(self, request_id: str) -> None:
        """End a request's completions; what they wrote so far is reported with finish reason
        `abort`."""
        for sequence in self.scheduler.find(request_id):
            self._finish(sequence, "abort")

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_work

    @property
    def running(self) -> list[Sequence]:
        """Sequences that run, oldest first."""
        return self.scheduler.running

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling: SamplingParams | list[SamplingParams] | None = None,
        routing: RoutingParams | list[RoutingParams] | None = None,
        on_finish: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many, all at once.

        Args:
            prompts: one prompt, or a list of them.
            sampling, routing: for all prompts, or a list with one for each.
            on_finish: called with each output as it finishes, in any order.

        Returns:
            Outputs in the order of the prompts, then of `n`.

        Raises:
            UsageError, DataError: a prompt cannot run; none does then.
        """
        batch: list[Prompt] = prompts if _is_batch(prompts) else [prompts]  # type: ignore[assignment, list-item]
        samplings = _one_each("sampling", sampling or SamplingParams(), len(batch))
        routings = _one_each("routing", routing or RoutingParams(), len(batch))
        ids: dict[str, int] = {}
        outputs: dict[tuple[int, int], RequestOutput] = {}
        try:
            for order, request in enumerate(zip(batch, samplings, routings, strict=True)):
                ids[self.add_request(*request)] = order
            num_outputs = sum(one.n for one in samplings)
            while len(outputs) < num_outputs:
                for event in self.step():
                    if isinstance(event, FinishEvent) and event.request_id in ids:
                        outputs[ids[event.request_id], event.index] = event.output
                        if on_finish:
                            on_finish(event.output)
        finally:
            for request_id in ids:  # interrupted: leave nothing behind
                self.abort(request_id)
            self._events = [e for e in self._events if e.request_id not in ids]
        return [outputs[key] for key in sorted(outputs)]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        routing: RoutingParams | None = None,
    ) -> Iterator[Event]:
        """Generate for one prompt, event by event; closing the iterator aborts the request."""
        num_open = sampling.n if sampling else 1
        request_id = self.add_request(prompt, sampling, routing)
        try:
            while num_open:
                for event in self.step():
                    if event.request_id == request_id:
                        num_open -= isinstance(event, FinishEvent)
                        yield event
        finally:
            self.abort(request_id)

    # ------------------------------------------------------------------ the tick

    def step(self) -> list[Event]:
        """One tick; what happened in it, for all requests."""
        self.scheduler.admit()
        slm = [s for s in self.running if s.policy.turn is not Turn.LLM]
        if slm:
            self._run(Model.SLM, slm)
        llm = [s for s in self.running if s.policy.turn is Turn.LLM]
        if llm and (
            len(llm) == len(self.running)
            or len(llm) >= self.llm_min_batch
            or max(s.ticks_waiting for s in llm) >= self.llm_max_wait
        ):
            self._draft(llm)
            # Drafting may have ended or preempted some.
            self._run(Model.LLM, [s for s in llm if s.finish_reason is None])
        else:
            for sequence in llm:
                sequence.ticks_waiting += 1
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Assert that every KV block is accounted for."""
        self.scheduler.check_integrity()

    def _run(self, model: Model, candidates: list[Sequence]) -> None:
        """Run one model over as many of the sequences as fit a forward pass; write what it says."""
        for sequence in candidates:
            self._sync(sequence, model)
        ready: list[tuple[Sequence, range]] = []
        batch, rows = self._forward(model, candidates)
        for sequence, row, picked in batch:
            if sequence.trace is not None and model is Model.LLM and self.shared:
                self._trace_catch_up(sequence, row, rows, picked)
                picked = picked[-1:]
            if picked and (sequence.num_drafts or sequence.num_outstanding(model) == 0):
                ready.append((sequence, picked))
        if ready:
            self._write(model, ready, rows)
        for sequence in candidates:  # whose drafts nobody looked at
            if sequence.num_drafts:
                end = len(sequence.timelines[model].tokens) - sequence.num_drafts
                sequence.drop_drafts()
                self.scheduler.roll_back(sequence, end, end)

    def _forward(
        self, model: Model, candidates: list[Sequence]
    ) -> tuple[list[tuple[Sequence, Row, range]], Rows]:
        """Compute what fits a pass: sequences, their rows, and where the wanted ones are in what
        came out. Who fails is ended and left out."""
        batch = self.scheduler.schedule(model, candidates)
        wanted = [self._num_wanted(sequence, row, model) for sequence, row in batch]
        try:
            if not batch:
                return [], _NOTHING
            rows = self.runners[model].forward([row for _, row in batch], wanted)
        except (RuntimeError, EngineError) as error:
            for sequence, _ in batch:
                self._fail(sequence, f"the {model.name} failed: {error}")
            return [], _NOTHING
        finite = (~rows.logits_RV.amax(-1).isnan()).tolist()  # a maximum with NaN is NaN
        offset, computed = 0, []
        for (sequence, row), num_wanted in zip(batch, wanted, strict=True):
            first, offset = offset, offset + num_wanted
            self.scheduler.advance(sequence, row, model)
            if all(finite[first:offset]):
                computed.append((sequence, row, range(first, offset)))
            else:
                position = len(sequence.tokens)
                self._fail(sequence, f"the {model.name} gave NaN logits at position {position}")
        return computed, rows

    def _draft(self, sequences: list[Sequence]) -> None:
        """Let the SLM write ahead where the LLM has more than a token to write. Drawn with the
        LLM's own random numbers, so that two models that agree draft what is accepted."""
        # Where the SLM has nothing to compute (its proposal was just deferred) the LLM goes first.
        drafting = [
            s for s in sequences if self._num_drafts_wanted(s) > 0 and s.num_outstanding(Model.SLM)
        ]
        while drafting:
            batch, rows = self._forward(Model.SLM, drafting)
            batch = [one for one in batch if one[0].num_outstanding(Model.SLM) == 0]
            if not batch:
                return
            index = [picked[-1] for _, _, picked in batch]
            ready = [sequence for sequence, _, _ in batch]
            tokens = sample(
                rows.logits_RV[index],
                [s.sampling for s in ready],
                [uniform(s.seed, len(s.tokens) + s.num_drafts, Stream.LLM) for s in ready],
            )
            for sequence, token in zip(ready, tokens, strict=True):
                sequence.timelines[Model.SLM].tokens.append(token)
                sequence.num_drafts += 1
                sequence.stats.draft_tokens += 1
            drafting = [s for s in ready if s.num_drafts < self._num_drafts_wanted(s)]

    def _num_drafts_wanted(self, sequence: Sequence) -> int:
        """Drafts of a sequence whose turn is the LLM's; none where a span is one token."""
        route = sequence.policy.route
        if route.granularity == "token" and route.router.constant is not Model.LLM:
            return 0
        written = len(sequence.tokens)
        room = min(self.room) - len(sequence.timelines[0].tokens) + sequence.num_drafts
        return min(sequence.draft_length, sequence.max_tokens - written - 1, room - 1)

    def _num_wanted(self, sequence: Sequence, row: Row, model: Model) -> int:
        """Of how many of a row's last tokens the logits are wanted."""
        timeline = sequence.timelines[model]
        if sequence.trace is not None and model is Model.LLM and self.shared:
            return max(0, row.end - max(row.start, timeline.num_prompt_tokens - 1))
        if model is Model.LLM:  # the last token, and the drafts after it
            return max(0, row.end - (len(timeline.tokens) - sequence.num_drafts) + 1)
        return int(row.end == len(timeline.tokens))

    def _write(self, model: Model, ready: list[tuple[Sequence, range]], rows: Rows) -> None:
        """Sample from each sequence's rows; the SLM's proposals at decision points are scored
        first. Several rows check drafts: each gives the LLM's own token, which stands whatever was
        drafted, and the row after it counts if the draft was that token."""
        index = [i for _, picked in ready for i in picked]
        logits = rows.logits_RV[index]
        stream = Stream(model)
        params = [s.sampling for s, picked in ready for _ in picked]
        draws = [
            uniform(s.seed, len(s.tokens) + i, stream)
            for s, picked in ready
            for i in range(len(picked))
        ]
        sampled = sample(logits, params, draws)
        deferred: set[int] = set()
        if model is Model.SLM:
            sequences = [sequence for sequence, _ in ready]
            layers = {layer: hidden_RH[index] for layer, hidden_RH in rows.layers.items()}
            proposals = Rows(rows.hidden_RH[index], logits, layers)
            deferred = self._decide(sequences, sampled, proposals)
        offset = 0
        for i, (sequence, picked) in enumerate(ready):
            first, offset = offset, offset + len(picked)
            if i not in deferred:
                self._take(sequence, model, sampled[first:offset], logits[first:offset])

    def _take(
        self, sequence: Sequence, model: Model, tokens: list[int], logits: torch.Tensor
    ) -> None:
        """Write a row's token, and those of the rows after it while the drafts were right and the
        span goes on."""
        drafts = sequence.drop_drafts()
        start = len(sequence.timelines[model].tokens)
        pairs = enumerate(zip(drafts, tokens, strict=False))
        num_right = next((i for i, (draft, own) in pairs if draft != own), len(drafts))
        num_written = 0
        for i, token in enumerate(tokens[: num_right + 1]):
            logprob = None
            if sequence.sampling.logprobs is not None:
                logprob = token_logprob(logits[i], token, sequence.sampling.logprobs)
            self._append(sequence, model, token, logprob)
            num_written += 1
            if sequence.policy.close_due and sequence.finish_reason is None:
                self._close_thinking(sequence)
                break
            if sequence.finish_reason is not None or sequence.policy.turn is not Turn.LLM:
                break
        if drafts:
            sequence.stats.draft_accepted += min(num_right, num_written)
            # One more than was right: as many as are likely to be right again, and a try.
            sequence.draft_length = min(sequence.policy.route.params.speculate, num_right + 1)
            if sequence.finish_reason is None:
                # The last token stays to be computed, by whoever's turn is next.
                end = start + min(num_right, num_written - 1)
                self.scheduler.roll_back(sequence, start, end)

    def _decide(self, sequences: list[Sequence], tokens: list[int], rows: Rows) -> set[int]:
        """Score the SLM's proposals where a decision is due; indices of those that go to the
        LLM."""
        by_router: dict[Router, list[int]] = {}
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            policy = sequence.policy
            if policy.turn is not Turn.DECIDE:
                continue
            if policy.in_opening and policy.is_opening(self._text_of(token)):
                continue
            by_router.setdefault(policy.route.router, []).append(i)
        if not by_router:
            return set()
        signals = Signals(
            hidden_NH=rows.hidden_RH,
            logits_NV=rows.logits_RV,
            candidates_N=torch.tensor(tokens, device=rows.logits_RV.device),
            positions=[len(s.tokens) for s in sequences],
            uniforms=[uniform(s.seed, len(s.tokens), Stream.ROUTER) for s in sequences],
            layers=rows.layers,
        )
        deferred = set()
        for router, members in by_router.items():
            scores = router.score(signals.rows(members)).tolist()
            for i, score in zip(members, scores, strict=True):
                if self._verdict(sequences[i], score, tokens[i]):
                    deferred.add(i)
        return deferred

    def _text_of(self, token: int) -> str:
        return str(self.pair.slm.tokenizer.decode([token]))

    def _verdict(self, sequence: Sequence, score: float, token: int) -> bool:
        policy = sequence.policy
        deferred = policy.decide(score)
        sequence.score = score
        sequence.stats.decisions += 1
        sequence.stats.deferrals += deferred
        if sequence.trace is not None:
            position = len(sequence.tokens)
            sequence.trace[position] = Decision(
                position=position,
                source=Model(deferred).label,
                token=token,
                score=score,
                threshold=policy.route.threshold,
                deferred=deferred,
                capped=policy.capped,
                slm_token=token,
            )
        return deferred

    # ------------------------------------------------------------------ the timeline

    def _append(
        self, sequence: Sequence, model: Model, token: int, logprob: TokenLogprob | None = None
    ) -> None:
        """Write one token: to the timeline, the text, the policy and the event stream; then check
        the stops."""
        switched = bool(sequence.sources) and sequence.sources[-1] is not model
        position = len(sequence.tokens)
        sequence.stats.switches += switched
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
        timeline = sequence.timelines[model]
        timeline.tokens.append(token)

        sampling = sequence.sampling
        reason: FinishReason | None = None
        if token in sampling.stop_token_ids or (
            token in sequence.eos_ids[model] and not sampling.ignore_eos
        ):
            reason = "stop"
        else:
            detokenizer = sequence.detokenizers[model]
            text = detokenizer.append(token)
            sequence.text += text
            timeline.num_chars = len(sequence.text)
            sequence.policy.append(model, text, complete=detokenizer.complete)
            sequence.end = sequence.find_stop(len(text))
            if sequence.end is not None:
                reason = "stop"
            elif len(sequence.tokens) >= sequence.max_tokens or self._out_of_room(sequence):
                reason = "length"
        if reason:
            self._finish(sequence, reason, quiet=True)
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
            self._events.append(FinishEvent(sequence.request_id, sequence.index, sequence.output()))

    def _out_of_room(self, sequence: Sequence) -> bool:
        return any(len(sequence.timelines[m].tokens) >= self.room[m] for m in Model)

    def _close_thinking(self, sequence: Sequence) -> None:
        """Close the thinking by force: write the closing tag, or end a text that has none."""
        sequence.looped = sequence.policy.repeated
        if self.tags is None:
            self._finish(sequence, "length")
            return
        self._sync(sequence, Model.SLM)
        text = sequence.policy.closing_text()
        for token in self.pair.slm.tokenizer.encode(text, add_special_tokens=False):
            sequence.stats.forced_tokens += 1
            self._append(sequence, Model.SLM, token)
            if sequence.finish_reason is not None:
                return

    def _sync(self, sequence: Sequence, model: Model) -> None:
        """With two tokenizers: give a model's timeline the text the other one wrote since it last
        ran."""
        timeline = sequence.timelines[model]
        if sequence.shared or timeline.num_chars == len(sequence.text):
            return
        text = sequence.text[timeline.num_chars :]
        ids = self.pair[model].tokenizer.encode(text, add_special_tokens=False)
        timeline.tokens += ids
        timeline.num_chars = len(sequence.text)
        for token in ids:
            sequence.detokenizers[model].append(token)

    # ------------------------------------------------------------------ ends

    def _finish(self, sequence: Sequence, reason: FinishReason, *, quiet: bool = False) -> None:
        """End a completion and give its blocks back; `quiet` leaves the events to the caller."""
        if sequence.looped and reason in ("stop", "length"):
            reason = "repetition"
        if sequence.end is None:
            sequence.text += sequence.detokenizers[
                sequence.sources[-1] if sequence.sources else 0
            ].flush()
        sequence.finish_reason = reason
        self.scheduler.remove(sequence, forget=reason == "error")
        self._warn_undelimited(sequence)
        if not quiet:
            self._events.append(FinishEvent(sequence.request_id, sequence.index, sequence.output()))

    def _fail(self, sequence: Sequence, message: str) -> None:
        """End one completion by an error of its own; its blocks are not reused by content."""
        sequence.error = message
        log.error("%s: %s", sequence.request_id, message)
        self._finish(sequence, "error")

    def _trace_catch_up(self, sequence: Sequence, row: Row, rows: Rows, picked: range) -> None:
        """Record what the LLM would have written at each generated position it caught up over."""
        assert sequence.trace is not None
        num_prompt = sequence.timelines[Model.LLM].num_prompt_tokens
        choices = rows.logits_RV[picked.start : picked.stop].max(-1).indices.tolist()
        for position, choice in enumerate(choices, start=row.end - len(choices) - num_prompt + 1):
            if position < len(sequence.tokens):
                sequence.trace[position] = replace(sequence.trace[position], llm_token=choice)

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

    def _load_router(self, router: str | Router) -> Router:
        """The router of a request; one object per name, so that requests that name the same are
        scored together."""
        if isinstance(router, str):
            if router not in self._named_routers:
                self._named_routers[router] = named_router(router)
            return self._named_routers[router]
        bind = getattr(router, "bind", None)
        if bind is not None:
            bind(self.pair.slm)
        if router.hidden_layer is not None:
            self.runners[Model.SLM].keep_layer(router.hidden_layer)
        return router

    def _check_room(self, prompts: tuple[list[int], list[int]], sampling: SamplingParams) -> None:
        """Raises UsageError if a prompt's tokens, or what it may write, do not fit."""
        for model, ids in zip(Model, prompts, strict=True):
            context = self.pair[model].context_length
            if len(ids) >= context:
                raise UsageError(
                    f"the prompt has {len(ids):,} tokens, "
                    f"the {model.name}'s context only {context:,}"
                )
            wanted = len(ids) + min(sampling.max_tokens or context, context - len(ids))
            if wanted > self.kv.capacity:
                raise UsageError(
                    f"kv_memory is too small for one request: it may take {wanted:,} tokens "
                    f"(prompt and max_tokens), {self.kv.capacity:,} fit; raise --kv_memory "
                    "or lower --max_tokens"
                )


T = TypeVar("T")
_NOTHING = Rows(torch.empty(0), torch.empty(0))


def _one_each(name: str, values: T | list[T], count: int) -> list[T]:
    """One value per prompt."""
    each = values if isinstance(values, list) else [values] * count
    if len(each) != count:
        raise UsageError(f"{name} has {len(each)} entries for {count} prompts")
    return each


def _is_batch(prompts: Prompt | list[Prompt]) -> bool:
    """Whether this is a list of prompts rather than one prompt (text, messages or token ids)."""
    return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], dict | int))
