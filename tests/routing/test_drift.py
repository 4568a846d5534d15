"""Drift: silent while requests are like those of calibration, loud soon after they are not."""

import dataclasses

import numpy as np
import pytest

from r2r_glimp.core import CheckpointError
from r2r_glimp.routing.drift import MIN_REQUESTS, DriftMonitor, Traffic

THRESHOLD = 0.2


class World:
    """Requests of a made-up router: harder ones score higher throughout, so tokens are anything but
    independent; their number differs."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def scores(self, shift: float = 0.0) -> np.ndarray:
        level = self.rng.normal(shift - 4, 0.6)
        return 1 / (1 + np.exp(-self.rng.normal(level, 1.5, self.rng.integers(20, 60))))

    def traffic(self, num_requests: int = 500) -> Traffic:
        scores = [self.scores() for _ in range(num_requests)]
        traffic = Traffic.measure(
            [share_of(one) for one in scores], scores,
            measured_on="made up", threshold=THRESHOLD, answer_by="router",
        )  # fmt: skip
        assert traffic is not None
        return traffic

    def alarm(self, monitor: DriftMonitor, num_requests: int, shift: float = 0.0) -> int | None:
        """Which request is the first that something drifts after."""
        for i in range(num_requests):
            scores = self.scores(shift)
            for score in scores.tolist():
                monitor.count("r", score)
            monitor.finish("r", share_of(scores))
            if monitor.drifting:
                return i + 1
        return None


def share_of(scores: np.ndarray) -> float:
    return float((scores > THRESHOLD).mean())


def test_no_alarm_on_traffic_like_calibrations() -> None:
    """20 calibrations, each with 1,000 requests like its own: at one false alarm in 100,000
    requests, less than one in five times is there any at all."""
    alarms = 0
    for seed in range(20):
        world = World(seed)
        alarms += world.alarm(DriftMonitor(world.traffic()), 1000) is not None
    assert alarms == 0


@pytest.mark.parametrize(("shift", "within"), [(0.5, 400), (1.0, 120), (2.0, 50), (-1.0, 120)])
def test_alarm_on_traffic_that_moved(shift: float, within: int) -> None:
    for seed in range(5):
        world = World(seed)
        monitor = DriftMonitor(world.traffic())
        world.alarm(monitor, 200)
        assert world.alarm(monitor, within, shift) is not None


def test_the_stated_rate_of_false_alarms_holds() -> None:
    """At the very edge of the band, where it is hardest to keep: with alarms allowed every 200
    requests, the mean time to one is more."""
    traffic = Traffic(measured_on="", threshold=0.5, answer_by="router", num_requests=100,
                      cuts=(), low=(0.0,), high=(0.3,))  # fmt: skip
    rng = np.random.default_rng(0)
    times = []
    for _ in range(60):
        monitor = DriftMonitor(traffic, requests_per_false_alarm=200)
        while not monitor.drifting and monitor.num_requests < 4000:
            monitor.count("r", 0.0)
            monitor.finish("r", float(rng.random() < 0.3))
        times.append(monitor.num_requests)
    assert np.mean(times) > 200


def test_what_drifts_is_told_and_an_end_of_it_too() -> None:
    world = World(0)
    traffic = world.traffic()
    monitor = DriftMonitor(traffic)
    assert world.alarm(monitor, 500, 2.0) is not None
    told = monitor.describe()
    assert "made up" in told and "\n" not in told and monitor.drifting[0] in told
    for _ in range(300):
        world.alarm(monitor, 1, 2.0)
    assert monitor.drifting[0] == "llm_share" and len(monitor.drifting) > 3
    assert monitor.recent[0] > traffic.high[0]
    for _ in range(3000):
        if not monitor.drifting:
            break
        world.alarm(monitor, 1)
    assert not monitor.drifting and "again" in monitor.describe()


def test_what_is_not_counted() -> None:
    world = World(0)
    monitor = DriftMonitor(world.traffic())
    assert not monitor.finish("nothing was decided", 1.0)
    monitor.count("aborted", 0.9)
    monitor.forget("aborted")
    assert not monitor.finish("aborted", 1.0)
    monitor.count("not finite", float("nan"))
    assert not monitor.finish("not finite", 1.0)
    assert monitor.num_requests == 0 and not monitor._open
    assert (
        Traffic.measure([0.1] * 99, [[0.5]] * 99, measured_on="", threshold=0, answer_by="llm")
        is None
    )
    assert MIN_REQUESTS == 100


def test_values_that_never_differ() -> None:
    """A band has a width even where calibration saw the same in every request."""
    traffic = Traffic.measure(
        [0.0] * 200, [[0.5, 0.5]] * 200, measured_on="", threshold=0.5, answer_by="llm"
    )
    assert traffic is not None and traffic.cuts == (0.5,)
    assert traffic.low == (0.0, 0.0) and traffic.high == (1 / 200, 1 / 200)
    monitor = DriftMonitor(traffic)
    for _ in range(1000):
        monitor.count("r", 0.5)
        assert not monitor.finish("r", 0.0)
    for _ in range(8):
        monitor.count("r", 0.6)
        monitor.finish("r", 0.0)
    assert monitor.drifting == ["scores_above_0.5"]


def test_from_json_and_nothing_else() -> None:
    traffic = World(0).traffic()
    data = traffic.to_dict()
    assert Traffic.from_dict(data) == traffic
    for name, value in (
        ("cuts", [0.2, 0.1]), ("cuts", "x"), ("low", []), ("high", [float("nan")] * 7),
        ("low", [1.0] * len(traffic.low)), ("answer_by", "me"), ("threshold", None),
        ("measured_on", 1), ("high", [2.0] * len(traffic.high)),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="calibrate again"):
            Traffic.from_dict({**data, name: value})
    with pytest.raises(CheckpointError, match="unknown key"):
        Traffic.from_dict({**data, "more": 1})
    assert dataclasses.replace(traffic, cuts=()).names == ["llm_share"]
