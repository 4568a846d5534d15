"""Exact block ids and counts of the pool, and its invariants under random use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2r_glimp.kv.pool import BlockPool


def test_allocates_fresh_blocks_before_cached_ones_and_oldest_first() -> None:
    pool = BlockPool(num_blocks=4, num_planes=2)
    first = pool.allocate(2)
    assert first == [1, 2]
    for block, key in zip(first, (b"a", b"b"), strict=True):
        pool.remember(block, key)
    pool.free(first)
    assert pool.allocate(2) == [3, 4]
    # A table's last block is reused first, so long prefixes stay longest.
    assert pool.allocate(1) == [2]
    assert pool.match([b"a", b"b"]) == [1]


def test_allocate_is_all_or_nothing() -> None:
    pool = BlockPool(num_blocks=2, num_planes=1)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    assert pool.allocate(2) == [1, 2]
    assert pool.allocate(1) is None


def test_match_shares_and_stops_at_the_first_gap() -> None:
    pool = BlockPool(num_blocks=4, num_planes=2)
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.remember(block, key)
    assert pool.match([b"a", b"x", b"c"]) == [1]
    assert pool.match([b"b"]) == [2]
    pool.check_integrity([blocks, [1], [2]])
    pool.free(blocks)
    assert pool.num_free == 2  # 3 and the never used 4; 1 and 2 are still held


def test_a_reused_block_is_empty_and_forgotten() -> None:
    pool = BlockPool(num_blocks=1, num_planes=2)
    blocks = pool.allocate(1)
    assert blocks == [1]
    pool.fill(1, plane=1)
    pool.remember(1, b"a")
    assert pool.is_filled(1, 1) and not pool.is_filled(1, 0)
    pool.free(blocks)
    pool.allocate(1)
    assert not pool.is_filled(1, 1)
    assert pool.match([b"a"]) == []


def test_the_first_block_of_a_content_stays_the_one_found() -> None:
    pool = BlockPool(num_blocks=2, num_planes=1)
    pool.allocate(2)
    pool.remember(1, b"a")
    pool.remember(2, b"a")
    assert pool.match([b"a"]) == [1]


def test_freeing_twice_is_a_bug() -> None:
    pool = BlockPool(num_blocks=1, num_planes=1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


@given(st.lists(st.tuples(st.sampled_from("amf"), st.integers(0, 5)), max_size=60))
def test_every_block_is_accounted_for(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks=6, num_planes=2)
    tables: list[list[int]] = []
    keys = [bytes([i]) for i in range(6)]
    for action, n in actions:
        if action == "a" and (blocks := pool.allocate(n)) is not None:
            tables.append(blocks)
            for block, key in zip(blocks, keys, strict=False):
                pool.remember(block, key)
                pool.fill(block, n % 2)
        elif action == "m":
            tables.append(pool.match(keys[:n]))
        elif action == "f" and tables:
            pool.free(tables.pop(n % len(tables)))
        pool.check_integrity(tables)
    for table in tables:
        pool.free(table)
    pool.check_integrity()
    assert pool.num_free == 6
