"""Reading texts for their rows: hidden states and logits at many positions, beside what the engine
writes.

The same runner, blocks and prefix cache as any request: tokens that some request left in the cache
are not computed again, and what is computed here can be matched by later requests.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import Model, Timeline
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import Rows

_MAX_LOGITS = 2**25  # of one pass: 128 MiB in float32


@dataclass(slots=True)
class _Reading:
    """A text under way. Rows from `first` on are wanted; `start` is how far it is computed."""

    index: int
    timeline: Timeline
    first: int
    start: int = 0

    @property
    def num_left(self) -> int:
        return len(self.timeline.tokens) - self.start


def read_rows(
    engine: Engine, model: Model, texts: Sequence[tuple[list[int], int]]
) -> Iterator[tuple[int, Rows]]:
    """Rows of many texts under one model, in as few passes as the token budget allows.

    Args:
        texts: token ids, and the first row that is wanted; row i predicts token i + 1.

    Yields:
        A text's index and its next wanted rows, in order; a long text comes in several parts. It
        stops early where blocks are not to be had: texts of which nothing came are to be tried
        again when running requests have ended. `engine.step()` must not run meanwhile.
    """
    waiting = deque(
        _Reading(i, Timeline(list(tokens), len(tokens)), first)
        for i, (tokens, first) in enumerate(texts)
    )
    reading: list[_Reading] = []
    max_wanted = max(16, _MAX_LOGITS // engine.pair[model].fingerprint.vocab_size)
    try:
        while True:
            batch, wanted = _next_pass(engine, model, waiting, reading, max_wanted)
            if not batch:
                return
            rows = engine.runners[model].forward([row for _, row in batch], wanted)
            offset = 0
            for (one, row), num_wanted in zip(batch, wanted, strict=True):
                engine.kv.commit(one.timeline, row.start, row.end, model)
                one.start = row.end
                if one.num_left == 0:
                    engine.kv.free(one.timeline, model)
                    reading.remove(one)
                if num_wanted:
                    part = slice(offset, offset + num_wanted)
                    layers = {layer: hidden_RH[part] for layer, hidden_RH in rows.layers.items()}
                    yield one.index, Rows(rows.hidden_RH[part], rows.logits_RV[part], layers)
                offset += num_wanted
    finally:
        for one in reading:
            engine.kv.free(one.timeline, model, forget=True)


def forget_prefixes(engine: Engine) -> None:
    """Empty the prefix cache, so that what follows does not depend on what ran before."""
    assert not engine.has_work, "requests hold blocks"
    for pool in engine.kv.pools:
        for block in range(1, pool.num_blocks + 1):
            pool.forget(block)


def _next_pass(
    engine: Engine,
    model: Model,
    waiting: deque[_Reading],
    reading: list[_Reading],
    max_wanted: int,
) -> tuple[list[tuple[_Reading, Row]], list[int]]:
    """Rows of the next pass: texts under way first, then as many new ones as fit."""
    budget = engine.scheduler.max_batch_tokens
    batch: list[tuple[_Reading, Row]] = []
    wanted: list[int] = []
    while budget and max_wanted:
        if len(batch) == len(reading):
            if not waiting or not _begin(engine, model, waiting[0]):
                break
            reading.append(waiting.popleft())
        one = reading[len(batch)]
        unwanted = max(0, one.first - one.start)
        num = min(one.num_left, budget, unwanted + max_wanted)
        end = one.start + num
        batch.append(
            (one, Row(one.timeline.tokens[one.start : end], one.start, one.timeline.blocks))
        )
        wanted.append(max(0, num - unwanted))
        budget -= num
        max_wanted -= wanted[-1]
    return batch, wanted


def _begin(engine: Engine, model: Model, one: _Reading) -> bool:
    """Take over what is known of a text and hold blocks for the rest; False if there are none."""
    engine.kv.match(one.timeline, model)
    if not engine.kv.reserve(one.timeline, len(one.timeline.tokens), model):
        engine.kv.free(one.timeline, model)
        return False
    # Wanted rows are computed even where their KV is known: the cache keeps no logits.
    one.start = min(engine.kv.num_filled(one.timeline, model), one.first)
    return True
