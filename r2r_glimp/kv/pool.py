"""Block pool: which KV blocks are free, live or remembered, and which planes of a block are filled.

Knows nothing about models, tensors or requests; a block is an id.

    free   ──allocate──▶ live ──free──▶ cached (hash kept, still matchable)
      ▲                                   │
      └────────── oldest reused first ────┘

A block has one plane per model: the same 16 tokens, computed by the SLM, by the LLM, by both or by
neither yet. Block 0 is never handed out; it stays zero and pads ragged batches.
"""

from collections import OrderedDict
from collections.abc import Iterable

BLOCK_SIZE = 16
NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` usable blocks with `num_planes` planes each."""

    def __init__(self, num_blocks: int, num_planes: int) -> None:
        self.num_blocks = num_blocks
        self.num_planes = num_planes
        self._ref_counts = [0] * (num_blocks + 1)
        self._hashes: list[bytes | None] = [None] * (num_blocks + 1)
        self._filled = [0] * (num_blocks + 1)  # bit m: plane m holds every token of the block
        self._by_hash: dict[bytes, int] = {}
        # Oldest first; the value is unused. Ordered, because a match takes a block out of the
        # middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Ids of `num_blocks` blocks, oldest cached ones reused first; None if that many are not to
        be had."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self.forget(block)
            self._ref_counts[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; the last ones of a table are reused first, so long prefixes stay
        longest."""
        for block in reversed(list(blocks)):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} freed twice"
            if self._ref_counts[block] == 0:
                self._free[block] = None

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of remembered blocks for a hash chain, now shared with the caller."""
        blocks = []
        for key in hashes:
            block = self._by_hash.get(key)
            if block is None:
                break
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
            blocks.append(block)
        return blocks

    def remember(self, block: int, key: bytes) -> None:
        """Make a full block matchable. The first block of a content stays the one that is found."""
        if self._hashes[block] is None and key not in self._by_hash:
            self._hashes[block] = key
            self._by_hash[key] = block

    def forget(self, block: int) -> None:
        """Make a block unmatchable and empty."""
        key = self._hashes[block]
        if key is not None:
            del self._by_hash[key]
            self._hashes[block] = None
        self._filled[block] = 0

    def forget_all(self) -> None:
        """Make every block that nobody holds unmatchable and empty."""
        for block in self._free:
            self.forget(block)

    def fill(self, block: int, plane: int) -> None:
        """Plane `plane` now holds every token of the block."""
        self._filled[block] |= 1 << plane

    def is_filled(self, block: int, plane: int) -> bool:
        return bool(self._filled[block] >> plane & 1)

    def check_integrity(self, tables: Iterable[list[int]] = ()) -> None:
        """Assert that free + live = all, that counts match the given tables, and that hashes are a
        bijection."""
        counts = [0] * (self.num_blocks + 1)
        for table in tables:
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts, (
            "reference counts differ from the tables that hold the blocks"
        )
        assert counts[NULL_BLOCK] == 0, "the null block was handed out"
        free = {block for block in range(1, self.num_blocks + 1) if counts[block] == 0}
        assert free == set(self._free), "free list differs from the blocks nobody holds"
        assert all(self._by_hash[h] == b for b, h in enumerate(self._hashes) if h is not None)
        assert all(self._hashes[b] == h for h, b in self._by_hash.items())
