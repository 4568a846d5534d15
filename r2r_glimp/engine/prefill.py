"""Reading a text for its rows: hidden states and logits at many positions, beside what the engine
writes.

The same runner, blocks and prefix cache as any request: prompt tokens that some request left in the
cache are not computed again, and what is computed here can be matched by later requests.
"""

from collections.abc import Iterator

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import Model, Timeline
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import Rows

_MAX_LOGITS = 2**25  # of one chunk: 128 MiB in float32


def read_rows(engine: Engine, model: Model, tokens: list[int], first: int) -> Iterator[Rows] | None:
    """Rows `first` to the last of a text under one model, chunk by chunk; row i predicts token i +
    1.

    Blocks are held until the iterator is exhausted or closed; `engine.step()` must not run before.

    Returns:
        None if the blocks are not to be had now: try again when running requests have ended.
    """
    assert 0 <= first < len(tokens), "at least one row must be wanted"
    timeline = Timeline(list(tokens), len(tokens))
    engine.kv.match(timeline, model)
    if not engine.kv.reserve(timeline, len(tokens), model):
        engine.kv.free(timeline, model)
        return None
    return _chunks(engine, model, timeline, first)


def forget_prefixes(engine: Engine) -> None:
    """Empty the prefix cache, so that what follows does not depend on what ran before."""
    assert not engine.has_work, "requests hold blocks"
    for pool in engine.kv.pools:
        for block in range(1, pool.num_blocks + 1):
            pool.forget(block)
    engine.scheduler.kv = engine.kv


def _chunks(engine: Engine, model: Model, timeline: Timeline, first: int) -> Iterator[Rows]:
    runner, vocab_size = engine.runners[model], engine.pair[model].fingerprint.vocab_size
    size = min(engine.scheduler.max_batch_tokens, max(16, _MAX_LOGITS // vocab_size))
    # Wanted rows are computed even where their KV is known: the cache keeps no logits.
    start = min(engine.kv.num_filled(timeline, model), first)
    clean = False
    try:
        while start < len(timeline.tokens):
            end = min(len(timeline.tokens), start + size)
            row = Row(timeline.tokens[start:end], start, timeline.blocks)
            rows = runner.forward([row], [max(0, end - max(start, first))])
            engine.kv.commit(timeline, start, end, model)
            start = end
            if end > first:
                yield rows
        clean = True
    finally:
        engine.kv.free(timeline, model, forget=not clean)
