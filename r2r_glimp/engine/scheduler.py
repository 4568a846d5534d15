"""Scheduler: which sequences run, which rows a forward pass computes, and who gives way when blocks
run out.

Knows sequences, cursors and blocks; nothing about models, sampling or routing.
"""

from bisect import insort
from collections import OrderedDict

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import Model
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.kv.manager import KVManager


class Scheduler:
    """The queue and the running sequences over one KV manager.

    Args:
        kv: where blocks come from.
        max_batch: sequences that run at once.
        max_batch_tokens: tokens one forward pass computes at most.
    """

    def __init__(self, kv: KVManager, *, max_batch: int, max_batch_tokens: int) -> None:
        self.kv = kv
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        # The next to be admitted first; keys alone, because one may be taken out anywhere.
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: list[Sequence] = []  # oldest first
        self._by_request: dict[str, list[Sequence]] = {}
        # Who could not be admitted, and how many blocks were free: nothing changes until more are.
        self._refused: tuple[Sequence | None, int] = (None, 0)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return sum(pool.num_free for pool in self.kv.pools)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting[sequence] = None
        self._by_request.setdefault(sequence.request_id, []).append(sequence)

    def find(self, request_id: str) -> list[Sequence]:
        """A request's sequences that have not ended."""
        return [*self._by_request.get(request_id, ())]

    def admit(self) -> None:
        """Let waiting sequences run while blocks for all they have, and one more token, are
        there."""
        while self.waiting and len(self.running) < self.max_batch:
            sequence = next(iter(self.waiting))
            if self._refused[0] is sequence and self.num_free <= self._refused[1]:
                return
            for timeline, model in sequence.distinct_timelines:
                self.kv.match(timeline, model)
            if not all(
                self.kv.reserve(timeline, len(timeline.tokens) + 1, model)
                for timeline, model in sequence.distinct_timelines
            ):
                self._release(sequence)
                self._refused = (sequence, self.num_free)
                return
            for model in Model:
                filled = self.kv.num_filled(sequence.timelines[model], model)
                sequence.num_computed[model] = filled
            sequence.stats.prefix_hits += sequence.num_computed[Model.SLM]
            del self.waiting[sequence]
            sequence.runs = True
            insort(self.running, sequence, key=lambda s: s.arrival)

    def schedule(self, model: Model, candidates: list[Sequence]) -> list[tuple[Sequence, Row]]:
        """Rows of the model's next forward pass, oldest sequences first, with blocks reserved.

        Long prompts are cut at the token budget. Where blocks run out the newest sequences are
        preempted.
        """
        budget, batch = self.max_batch_tokens, []
        for sequence in candidates:
            if budget == 0:
                break
            if not sequence.runs:
                continue  # preempted for an older one
            timeline, start = sequence.timelines[model], sequence.num_computed[model]
            end = min(len(timeline.tokens), start + budget)
            while not self.kv.reserve(timeline, end, model):
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                batch.append((sequence, Row(timeline.tokens[start:end], start, timeline.blocks)))
                budget -= end - start
        return [(sequence, row) for sequence, row in batch if sequence.runs]

    def advance(self, sequence: Sequence, row: Row, model: Model) -> None:
        """Move a model's cursor over a computed row. Drafts are computed, but not remembered."""
        sequence.num_computed[model] = row.end
        timeline = sequence.timelines[model]
        final = min(row.end, len(timeline.tokens) - sequence.num_drafts)
        if final > row.start:
            self.kv.commit(timeline, row.start, final, model)
        if model is Model.LLM:
            sequence.stats.llm_computed += len(row.tokens)
            sequence.ticks_waiting = 0
        else:
            sequence.stats.slm_computed += len(row.tokens)

    def roll_back(self, sequence: Sequence, start: int, end: int) -> None:
        """After drafts: of what the models computed from position `start` on, all up to `end` was
        right. The blocks stay; what follows is written over."""
        for model in Model:
            computed = min(sequence.num_computed[model], end)
            sequence.num_computed[model] = computed
            if computed > start:
                self.kv.commit(sequence.timelines[model], start, computed, model)

    def remove(self, sequence: Sequence, *, forget: bool) -> None:
        """Take out a sequence that ended; with `forget`, nobody may match what it computed."""
        if sequence.runs:
            self.running.remove(sequence)
        else:
            del self.waiting[sequence]
        self._release(sequence, forget=forget)
        others = self._by_request[sequence.request_id]
        others.remove(sequence)
        if not others:
            del self._by_request[sequence.request_id]

    def check_integrity(self) -> None:
        """Assert that every block is accounted for and every cursor lies on its timeline."""
        self.kv.check_integrity([pair for s in self.running for pair in s.distinct_timelines])
        for sequence in self.running:
            for model in Model:
                assert 0 <= sequence.num_computed[model] <= len(sequence.timelines[model].tokens)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it goes to the front of the queue and is recomputed."""
        self._release(sequence)
        sequence.drop_drafts()
        self.running.remove(sequence)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        sequence.stats.preemptions += 1

    def _release(self, sequence: Sequence, *, forget: bool = False) -> None:
        for timeline, model in sequence.distinct_timelines:
            self.kv.free(timeline, model, forget=forget)
        sequence.num_computed = [0, 0]
        sequence.runs = False
