"""Block tables of shared and separate timelines: what is matched, filled, and given back."""

from r2r_glimp.core import Model, Timeline
from r2r_glimp.kv.manager import KVManager
from r2r_glimp.kv.pool import BLOCK_SIZE

SLM, LLM = Model.SLM, Model.LLM


def timeline(num_tokens: int, offset: int = 0) -> Timeline:
    return Timeline([offset + i for i in range(num_tokens)], num_tokens)


def run(kv: KVManager, line: Timeline, model: Model, end: int | None = None) -> None:
    end = len(line.tokens) if end is None else end
    assert kv.reserve(line, end, model)
    kv.commit(line, 0, end, model)


def test_both_models_find_what_each_of_them_computed() -> None:
    kv = KVManager(8, shared=True)
    first = timeline(40)
    run(kv, first, SLM)
    run(kv, first, LLM, end=20)
    kv.free(first, SLM)

    second = timeline(40)
    kv.match(second, SLM)
    assert list(second.blocks) == [1, 2]
    assert kv.num_filled(second, SLM) == 2 * BLOCK_SIZE
    assert kv.num_filled(second, LLM) == BLOCK_SIZE
    # The LLM completes the shared block's plane for everybody.
    kv.commit(second, 16, 32, LLM)
    assert kv.num_filled(second, LLM) == 2 * BLOCK_SIZE


def test_the_last_token_is_never_matched() -> None:
    kv = KVManager(8, shared=True)
    first = timeline(2 * BLOCK_SIZE)
    run(kv, first, SLM)
    kv.free(first, SLM)
    second = timeline(2 * BLOCK_SIZE)
    kv.match(second, SLM)
    assert list(second.blocks) == [1]


def test_a_different_beginning_shares_nothing() -> None:
    kv = KVManager(8, shared=True)
    first = timeline(40)
    run(kv, first, SLM)
    other = Timeline([999, *first.tokens[1:]], 40)
    kv.match(other, SLM)
    assert list(other.blocks) == []


def test_partly_filled_blocks_are_not_remembered() -> None:
    kv = KVManager(8, shared=True)
    first = timeline(40)
    run(kv, first, SLM, end=BLOCK_SIZE - 1)
    kv.free(first, SLM)
    second = timeline(40)
    kv.match(second, SLM)
    assert list(second.blocks) == []


def test_forgotten_blocks_are_not_matched_again() -> None:
    kv = KVManager(8, shared=True)
    first = timeline(40)
    run(kv, first, SLM)
    kv.free(first, SLM, forget=True)
    second = timeline(40)
    kv.match(second, SLM)
    assert list(second.blocks) == []


def test_reserve_is_all_or_nothing() -> None:
    kv = KVManager(2, shared=True)
    line = timeline(40)
    assert not kv.reserve(line, 40, SLM)
    assert list(line.blocks) == []
    assert kv.reserve(line, 32, SLM)
    assert list(line.blocks) == [1, 2]


def test_two_timelines_have_two_pools() -> None:
    kv = KVManager(4, shared=False)
    slm, llm = timeline(20), timeline(30, offset=100)
    run(kv, slm, SLM)
    run(kv, llm, LLM)
    assert (list(slm.blocks), list(llm.blocks)) == ([1, 2], [1, 2])
    kv.check_integrity([(slm, SLM), (llm, LLM)])
    kv.free(slm, SLM)
    kv.free(llm, LLM)
    kv.check_integrity([])
    assert [pool.num_free for pool in kv.pools] == [4, 4]


def test_without_the_prefix_cache_nothing_is_matched() -> None:
    kv = KVManager(8, shared=True, prefix_cache=False)
    first = timeline(40)
    run(kv, first, SLM)
    kv.free(first, SLM)
    second = timeline(40)
    kv.match(second, SLM)
    assert list(second.blocks) == []
