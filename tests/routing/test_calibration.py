"""Searching thresholds: on a world whose shares are known, and on one that misbehaves."""

import numpy as np
import pytest

from r2r_glimp.core import UsageError
from r2r_glimp.routing.calibration import (
    Measurement,
    ShareCurve,
    format_count,
    parse_count,
    pilot_of,
    search_shares,
    share_for_parameters,
)


class World:
    """Requests of 40 tokens, each a decision; most scores are tiny, as entropies are."""

    def __init__(self, num_requests: int = 400, *, feedback: float = 0.0, ties: int = 0) -> None:
        rng = np.random.default_rng(0)
        self.scores = np.exp(rng.normal(-5, 2.5, (num_requests, 40)))
        if ties:
            self.scores = np.round(self.scores * ties) / ties
        self.feedback = feedback  # how far the scores fall with what the LLM has written
        self.measured: list[tuple[float, bool]] = []

    def measure(self, thresholds, pilot) -> list[Measurement]:
        points = []
        for threshold in thresholds:
            self.measured.append((threshold, pilot))
            scores = self.scores[::8] if pilot else self.scores
            share = (scores > threshold).mean()
            scores = scores * np.exp(-self.feedback * share)
            deferred = (scores > threshold).sum(1)
            tokens = np.full(len(scores), scores.shape[1])
            points.append(Measurement(threshold, deferred, tokens, np.sort(scores.ravel())))
        return points


def point(threshold: float, share: float, num_requests: int = 10, scores=()) -> Measurement:
    tokens = np.full(num_requests, 1000)
    llm = np.full(num_requests, round(1000 * share))
    return Measurement(threshold, llm, tokens, np.array(sorted(scores), float))


TARGETS = [0.01, 0.05, 0.1, 0.2, 0.4]


@pytest.mark.parametrize("feedback", [0.0, 1.5])
@pytest.mark.parametrize("pilot", [True, False])
def test_all_targets_are_met(feedback, pilot):
    world = World(feedback=feedback)
    result = search_shares(world.measure, TARGETS, low=0.0, high=20.0, pilot=pilot)
    for target, found in result.found.items():
        assert found.share == pytest.approx(target, rel=0.02)
        assert found.num_requests == 400
        (again,) = world.measure([found.threshold], False)
        assert again.share == found.share
    assert len(set(world.measured)) == len(world.measured) - len(TARGETS)  # nothing twice
    whole = [t for t, on_pilot in world.measured if not on_pilot]
    assert not pilot or len(whole) - len(TARGETS) <= 3 * len(TARGETS)


def test_the_curve_shows_shares_that_nobody_asked_for():
    curve = search_shares(World().measure, [0.1], low=0.0, high=20.0).curve
    shares = [p.share for p in curve.points]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0
    for wanted in (0.02, 0.2, 0.4, 0.8):
        assert min(abs(share - wanted) for share in shares) < 0.1


def test_a_rising_share():
    """The random router defers below the threshold."""
    uniforms = np.random.default_rng(0).random((300, 30))

    def measure(thresholds, pilot):
        tokens = np.full(300, 30)
        flat = np.sort(uniforms.ravel())
        return [Measurement(t, (uniforms < t).sum(1), tokens, flat) for t in thresholds]

    found = search_shares(measure, [0.1, 0.5], low=0.0, high=1.0, pilot=False).found
    assert found[0.1].threshold == pytest.approx(0.1, abs=0.02)
    assert found[0.5].share == pytest.approx(0.5, rel=0.02)


def test_tied_scores_give_the_nearest_there_is():
    world = World(ties=20)
    found = search_shares(world.measure, [0.1], low=0.0, high=20.0, pilot=False).found[0.1]
    possible = [(world.scores > t).mean() for t in np.unique(world.scores)]
    assert found.share == min(possible, key=lambda share: abs(share - 0.1))
    assert not np.isclose(found.threshold, world.scores).any()  # never on a score


def test_a_target_beyond_the_ends_is_refused():
    def measure(thresholds, pilot):
        return [point(t, 0.3 + 0.5 * (t < 1)) for t in thresholds]

    with pytest.raises(UsageError, match=r"shares go from 30.0% to 80.0%"):
        search_shares(measure, [0.1], low=0.0, high=2.0)
    with pytest.raises(UsageError, match="0.9 cannot be: 0.8"):
        search_shares(
            measure, [0.9], low=0.0, high=2.0,
            why_not=lambda target, near: f"{target} cannot be: {near.share}",
        )  # fmt: skip


def test_between_goes_by_the_scores_not_by_the_thresholds():
    scores = [0.001, 0.002, 0.003, 0.004, 5.0]
    curve = ShareCurve([point(0.0, 1.0, scores=scores), point(10.0, 0.0, scores=scores)])
    assert curve.between(0.5) == pytest.approx(0.0035)
    assert curve.between(0.01) == pytest.approx(2.502)
    assert ShareCurve([point(0.0, 1.0), point(10.0, 0.0)]).between(0.5) is None


def test_more_requests_replace_fewer_at_a_threshold():
    curve = ShareCurve([point(0.5, 0.1, 10), point(0.5, 0.2, 100), point(0.5, 0.3, 20)])
    assert [p.share for p in curve.points] == [0.2]


def test_the_interval_is_of_requests_not_of_tokens():
    rng = np.random.default_rng(1)
    each = rng.random(200) < 0.1  # a request is the LLM's as a whole, or not at all
    whole = Measurement(0.0, each * 50, np.full(200, 50))
    low, high = whole.interval
    expected = 1.96 * np.sqrt(whole.share * (1 - whole.share) / 200)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert low < whole.share < high
    assert Measurement(0.0, np.zeros(5, int), np.full(5, 9)).interval == (0.0, 0.0)


def test_intervals_cover():
    """A 95% interval holds the true share in some 95% of the cases."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(60):
        tokens = rng.integers(20, 80, 120)
        point = Measurement(0.0, rng.binomial(tokens, 0.1), tokens)
        low, high = point.interval
        hits += low <= 0.1 <= high
    assert hits >= 52


def test_pilot():
    assert pilot_of(list(range(100))) == list(range(100))
    assert pilot_of(list(range(300))) == list(range(0, 300, 2))
    assert len(pilot_of(list(range(8000)))) == 1000


def test_parameters():
    assert share_for_parameters(1.5e9, 0.5e9, 10e9) == pytest.approx(0.1)
    assert share_for_parameters(1.5e9, 0.5e9, 10e9, 0.5e9) == pytest.approx(0.05)
    with pytest.raises(UsageError, match=r"400M .* cannot be had: .* more than 500M .* than 10.5B"):
        share_for_parameters(0.4e9, 0.5e9, 10e9)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5B", 1.5e9), ("300M", 3e8), ("20k", 2e4), ("1.5", 1.5e9), (2, 2e9), ("250000", 250000)],
)
def test_counts(text, count):
    assert parse_count(text) == pytest.approx(count)


@pytest.mark.parametrize("text", ["", "many", "-1B", "nan", "0", "B"])
def test_bad_counts(text):
    with pytest.raises(UsageError, match="no number of parameters"):
        parse_count(text)


def test_counts_for_people():
    assert [format_count(n) for n in (7, 1234, 127424, 3.4e8, 1.54e9)] == (
        ["7", "1.23K", "127K", "340M", "1.54B"]
    )
