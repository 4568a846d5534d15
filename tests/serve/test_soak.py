"""A short soak; `python -m tests.serve.soak` is the long one."""

from tests.serve.soak import soak


def test_soak() -> None:
    tally = soak(seconds=10, clients=64, seed=1, pool=40)
    assert not tally.errors, tally.errors
    assert min(tally.counts[kind] for kind in ("whole", "cancel", "cut", "bad", "half")) > 2
