"""The tick: the SLM over every row whose turn it is, then the LLM over the rows that wait for it.

There are no phases: prefill, decode and catch-up are all "model m computes
`tokens[num_computed[m]:]`, look at the last row".
"""

from dataclasses import replace

import torch

from r2r_glimp.core import Model
from r2r_glimp.engine.decider import Decider
from r2r_glimp.engine.drafter import Drafter
from r2r_glimp.engine.passes import Computed, Passes, sampled
from r2r_glimp.engine.patience import Patience
from r2r_glimp.engine.remote import RemoteTurns
from r2r_glimp.engine.runner import Rows
from r2r_glimp.engine.sampling import Stream, token_logprob, uniform
from r2r_glimp.engine.scheduler import Scheduler
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.engine.writer import Writer
from r2r_glimp.routing.policy import Turn


class Tick:
    """Admits, runs both models once at most, and has written what they say.

    Args:
        scheduler, passes, decider, drafter, writer, remote, patience: the engine's.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        passes: Passes,
        decider: Decider,
        drafter: Drafter,
        writer: Writer,
        remote: RemoteTurns,
        patience: Patience,
    ) -> None:
        self.scheduler = scheduler
        self.passes = passes
        self.decider = decider
        self.drafter = drafter
        self.writer = writer
        self.remote = remote
        self.patience = patience

    def run(self) -> None:
        """One tick."""
        self.scheduler.admit()
        running = self.scheduler.running
        slm = [s for s in running if s.policy.turn is not Turn.LLM and s.pending is None]
        if self.remote.has(Model.SLM):
            self.remote.ask(Model.SLM, slm)
        elif slm:
            self.patience.count(Model.SLM, slm)
            self._advance(Model.SLM, slm)
        llm = [s for s in running if s.policy.turn is Turn.LLM and s.pending is None]
        if self.remote.has(Model.LLM):
            self.remote.ask(Model.LLM, llm)
        elif llm:
            self._let_llm_write(llm, len(running) - len(llm))
        self.remote.write(running, idle=all(s.pending is not None for s in running))

    def _let_llm_write(self, waiting: list[Sequence], num_others: int) -> None:
        """Run the LLM over the sequences that wait for it, unless more are worth waiting for."""
        if self.patience.waits(waiting, num_others):
            for sequence in waiting:
                sequence.ticks_waiting += 1
            return
        self.patience.count(Model.LLM, waiting)
        self.drafter.draft(waiting)
        # Drafting may have ended or preempted some.
        self._advance(Model.LLM, [s for s in waiting if s.finish_reason is None])

    def _advance(self, model: Model, candidates: list[Sequence]) -> None:
        """Run one model over as many of the sequences as fit a forward pass; write what it says."""
        for sequence in candidates:
            self.writer.sync(sequence, model)
        ready: list[tuple[Sequence, range]] = []
        batch, rows = self.passes.run(model, candidates, Stream(model))
        for one in batch:
            sequence, picked = one.sequence, one.wanted
            if model is Model.LLM and sequence.traces_llm:
                _trace_catch_up(one, rows)
                picked = picked[-1:]
            if picked and (sequence.num_drafts or sequence.num_outstanding(model) == 0):
                ready.append((sequence, picked))
        if ready:
            self._choose(model, ready, rows)
        for sequence in candidates:
            self.drafter.drop(sequence)

    def _choose(self, model: Model, ready: list[tuple[Sequence, range]], rows: Rows) -> None:
        """Sample from each sequence's rows; the SLM's proposals at decision points are scored
        first."""
        rows = rows.pick([i for _, picked in ready for i in picked])
        stream = Stream(model)
        params = [s.sampling for s, picked in ready for _ in picked]
        draws = [
            uniform(s.seed, len(s.tokens) + i, stream)
            for s, picked in ready
            for i in range(len(picked))
        ]
        tokens = sampled(rows, params, draws)
        deferred: set[int] = set()
        if model is Model.SLM:
            deferred = self.decider.deferred([s for s, _ in ready], tokens, rows)
        offset = 0
        for i, (sequence, picked) in enumerate(ready):
            first, offset = offset, offset + len(picked)
            if i not in deferred:
                self._write(sequence, model, tokens[first:offset], rows.logits_RV[first:offset])

    def _write(
        self, sequence: Sequence, model: Model, tokens: list[int], logits_RV: torch.Tensor
    ) -> None:
        """Write a row's token, and those of the rows after it while the drafts were right and the
        span goes on. A token is the model's own choice, which stands whatever was drafted."""
        drafts = sequence.drop_drafts()
        start = len(sequence.timelines[model].tokens)
        pairs = enumerate(zip(drafts, tokens, strict=False))
        num_right = next((i for i, (draft, own) in pairs if draft != own), len(drafts))
        num_written = 0
        for i, token in enumerate(tokens[: num_right + 1]):
            logprob = None
            if sequence.sampling.logprobs is not None:
                logprob = token_logprob(logits_RV[i], token, sequence.sampling.logprobs)
            self.writer.append(sequence, model, token, logprob)
            num_written += 1
            if sequence.policy.close_due and sequence.finish_reason is None:
                self.writer.close_thinking(sequence)
                break
            if sequence.finish_reason is not None or sequence.policy.turn is not Turn.LLM:
                break
        if drafts:
            self.drafter.settle(sequence, start, num_right, num_written)


def _trace_catch_up(one: Computed, rows: Rows) -> None:
    """Record what the LLM would have written at each generated position it caught up over."""
    sequence = one.sequence
    assert sequence.trace is not None
    num_prompt = sequence.timelines[Model.LLM].num_prompt_tokens
    choices = rows.logits_RV[one.wanted.start : one.wanted.stop].max(-1).indices.tolist()
    for position, choice in enumerate(choices, start=one.row.end - len(choices) - num_prompt + 1):
        if position < len(sequence.tokens):
            sequence.trace[position] = replace(sequence.trace[position], llm_token=choice)
