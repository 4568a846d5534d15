"""A short soak; CI runs one minute of `python -m tests.serve.soak` besides."""

from tests.serve.soak import soak


def test_soak() -> None:
    tally = soak(seconds=6, clients=32, seed=1, pool=20)
    assert not tally.errors, tally.errors
    assert tally.counts["whole"] and tally.counts["cancel"] and tally.counts["bad"]
