"""KV manager: the block tables of all timelines over one pool, or over two where the tokenizers
differ.

    same tokenizer                            two tokenizers
    timeline ─▶ table ─▶ pool (2 planes)      SLM timeline ─▶ table ─▶ pool (1 plane)
                                              LLM timeline ─▶ table ─▶ pool (1 plane)

KV depends on the tokens and not on who chose them, so a block is one block for both models: one
admission, one free, one hash chain; each model fills its own plane when its cursor passes.
"""

import hashlib
from array import array

from r2r_glimp.core import Model, Timeline
from r2r_glimp.kv.pool import BLOCK_SIZE, BlockPool


class KVManager:
    """Allocates, shares and remembers KV blocks for timelines.

    Args:
        num_blocks: blocks of `BLOCK_SIZE` tokens, for each pool.
        shared: whether the models share one timeline (and so one pool).
        prefix_cache: whether blocks of finished requests may be matched by later ones.
    """

    def __init__(self, num_blocks: int, *, shared: bool, prefix_cache: bool = True) -> None:
        self.shared = shared
        self.prefix_cache = prefix_cache
        self.pools = (
            (BlockPool(num_blocks, 2),)
            if shared
            else tuple(BlockPool(num_blocks, 1) for _ in Model)
        )
        self.num_blocks = num_blocks

    @property
    def capacity(self) -> int:
        """Tokens one request can hold at most."""
        return self.num_blocks * BLOCK_SIZE

    def place(self, model: Model) -> tuple[BlockPool, int]:
        """The pool and the plane in it that hold a model's KV."""
        return (self.pools[0], int(model)) if self.shared else (self.pools[model], 0)

    def match(self, timeline: Timeline, model: Model) -> None:
        """Take over remembered blocks for a timeline that holds none.

        The block of the last token is never matched, so at least one row is always computed.
        """
        assert not timeline.blocks, "match() is for a timeline that holds no blocks"
        if self.prefix_cache:
            num_full = (len(timeline.tokens) - 1) // BLOCK_SIZE
            self._extend_hashes(timeline, num_full)
            found = self.place(model)[0].match(timeline.hashes[:num_full])
            timeline.blocks = array("i", found)

    def num_filled(self, timeline: Timeline, model: Model) -> int:
        """Leading tokens of a timeline whose KV the model finds in the blocks."""
        pool, plane = self.place(model)
        filled = 0
        for block in timeline.blocks:
            if not pool.is_filled(block, plane):
                break
            filled += BLOCK_SIZE
        return filled

    def reserve(self, timeline: Timeline, num_tokens: int, model: Model) -> bool:
        """Hold blocks for the first `num_tokens` tokens; False, and nothing changed, if they are
        not to be had."""
        missing = -(-num_tokens // BLOCK_SIZE) - len(timeline.blocks)
        if missing <= 0:
            return True
        blocks = self.place(model)[0].allocate(missing)
        if blocks is None:
            return False
        timeline.blocks.extend(blocks)
        return True

    def commit(self, timeline: Timeline, start: int, end: int, model: Model) -> None:
        """The model has computed tokens `start:end`: mark the blocks it completed, and remember
        them."""
        pool, plane = self.place(model)
        first, last = start // BLOCK_SIZE, end // BLOCK_SIZE
        if first == last:
            return
        self._extend_hashes(timeline, last)
        for i in range(first, last):
            pool.fill(timeline.blocks[i], plane)
            if self.prefix_cache:
                pool.remember(timeline.blocks[i], timeline.hashes[i])

    def free(self, timeline: Timeline, model: Model, *, forget: bool = False) -> None:
        """Give a timeline's blocks back; with `forget`, nobody may match them again (their content
        is suspect)."""
        pool = self.place(model)[0]
        if forget:
            for block in timeline.blocks:
                pool.forget(block)
        pool.free(timeline.blocks)
        timeline.blocks = array("i")

    def forget_all(self) -> None:
        """Empty the prefix cache: what is measured next shall not find what was computed before."""
        for pool in self.pools:
            pool.forget_all()

    def check_integrity(self, timelines: list[tuple[Timeline, Model]]) -> None:
        """Assert every pool's invariants against the live timelines; each distinct timeline is
        named once."""
        for pool in self.pools:
            pool.check_integrity(
                [list(t.blocks) for t, model in timelines if self.place(model)[0] is pool]
            )

    @staticmethod
    def _extend_hashes(timeline: Timeline, num_full: int) -> None:
        """Chained hashes of the first `num_full` full blocks; each is computed once per
        timeline."""
        for i in range(len(timeline.hashes), num_full):
            parent = timeline.hashes[-1] if timeline.hashes else b""
            tokens = array("q", timeline.tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
            timeline.hashes.append(
                hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()
            )
