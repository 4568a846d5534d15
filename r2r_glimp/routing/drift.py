"""Drift: whether live traffic is still like the text that a router was calibrated on.

A request is what is compared, since tokens of one text do not come independently. Each gives some
numbers between 0 and 1: its LLM share, and the share of its decisions whose score lies above each
of a few cuts. Calibration knows their means, with intervals: the band.

    wealth ◀─ max(1, wealth) x (1 + bet x (value - edge))         for the upper edge of a band
                               (1 + bet x (edge - value))         for the lower one

It is the wealth of a bettor against "the mean is within its band" (testing by betting: Waudby-Smith
and Ramdas, 2024). While that is true no bet pays, whatever the values' distribution, and it takes L
requests on average, or more, until the wealth reaches L (e-detectors: Shin, Ramdas and Rinaldo,
2023). So the one number to choose is how rare false alarms shall be; how soon a true one comes
follows from how far the traffic went.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from r2r_glimp.core import AnswerBy, CheckpointError
from r2r_glimp.routing.strict import check_keys

REQUESTS_PER_FALSE_ALARM = 100_000  # on average at least, of all statistics together
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.98)  # of the calibration's scores: the cuts
MIN_REQUESTS = 100  # of a calibration whose intervals can be relied on
_Z = 3.29  # of a normal interval that holds with 99.9%
_BETS = (0.5, 0.125)  # shares of the largest bet that cannot lose all; small shifts want small bets
_RECENT = 100  # requests that the recent means forget over


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What calibration saw, request by request: `traffic.json` of a router's checkpoint.

    Attributes:
        measured_on: prompts and settings, in words.
        threshold: under which it was routed.
        answer_by: who wrote the answers.
        num_requests: how many requests.
        cuts: scores; the statistics are the LLM share, then the share of scores above each cut.
        low, high: band of each statistic's mean over requests.
    """

    measured_on: str
    threshold: float
    answer_by: AnswerBy
    num_requests: int
    cuts: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """What the statistics are called."""
        return ["llm_share", *(f"scores_above_{cut:.4g}" for cut in self.cuts)]

    @classmethod
    def measure(
        cls,
        llm_shares: Sequence[float],
        scores: Sequence[Sequence[float]],
        *,
        measured_on: str,
        threshold: float,
        answer_by: AnswerBy,
    ) -> "Traffic | None":
        """From a calibration's requests; None where they are too few to tell.

        Args:
            llm_shares: of each request.
            scores: of each request's decisions.
        """
        decided = [np.asarray(one, float) for one in scores if len(one)]
        if len(decided) < MIN_REQUESTS:
            return None
        cuts = np.unique(np.quantile(np.concatenate(decided), QUANTILES))
        columns = [np.asarray(llm_shares, float)]
        columns += [np.array([(one > cut).mean() for one in decided]) for cut in cuts]
        bands = [_band(column) for column in columns]
        return cls(
            measured_on=measured_on,
            threshold=threshold,
            answer_by=answer_by,
            num_requests=len(decided),
            cuts=tuple(cuts.tolist()),
            low=tuple(low for low, _ in bands),
            high=tuple(high for _, high in bands),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Any, where: str = "traffic.json") -> "Traffic":
        """From the JSON form.

        Raises:
            CheckpointError: it is none.
        """
        check_keys(data, {field.name for field in fields(cls)}, where)
        columns = {name: data[name] for name in ("cuts", "low", "high")}
        sound = (
            isinstance(data["measured_on"], str)
            and data["answer_by"] in ("slm", "llm", "router")
            and all(isinstance(c, list) and all(map(_is_number, c)) for c in columns.values())
            and all(_is_number(data[name]) for name in ("threshold", "num_requests"))
        )
        if not (
            sound
            and len(data["low"]) == len(data["high"]) == len(data["cuts"]) + 1
            and data["cuts"] == sorted(set(data["cuts"]))
            and all(0 <= a < b <= 1 for a, b in zip(data["low"], data["high"], strict=True))
        ):
            raise CheckpointError(f"{where}: not what a calibration saw: calibrate again")
        return cls(**{**data, **{name: tuple(column) for name, column in columns.items()}})


@dataclass(slots=True)
class _Edge:
    """A bettor against a mean within one edge of a band."""

    statistic: int
    bound: float
    is_upper: bool
    wealth: list[float] = field(default_factory=lambda: [1.0] * len(_BETS))
    passed: bool = False

    def observe(self, value: float, limit: float) -> None:
        sign = 1 if self.is_upper else -1
        most = self.bound if self.is_upper else 1 - self.bound  # that a request can lie within
        gain = sign * (value - self.bound) / most
        cap = limit * len(_BETS)  # no more, so that an end of the drift shows soon too
        self.wealth = [
            min(cap, max(1.0, wealth) * (1 + bet * gain))
            for wealth, bet in zip(self.wealth, _BETS, strict=True)
        ]
        mean = sum(self.wealth) / len(_BETS)
        self.passed = mean >= limit or (self.passed and mean > 1)


class DriftMonitor:
    """Watches requests as they are written: O(1) work for a token, and for a request.

    Args:
        traffic: what calibration saw.
        name: of the router.
        requests_per_false_alarm: how rare they shall be, on average at least.
    """

    def __init__(
        self,
        traffic: Traffic,
        name: str = "",
        *,
        requests_per_false_alarm: float = REQUESTS_PER_FALSE_ALARM,
    ) -> None:
        self.traffic, self.name = traffic, name
        self.num_requests = 0
        self.recent = [math.nan] * len(traffic.names)  # means over the last requests
        self.drifting: list[str] = []  # statistics that left their band
        self._edges = [
            _Edge(i, edge, is_upper)
            for i, edges in enumerate(zip(traffic.low, traffic.high, strict=True))
            for edge, is_upper in zip(edges, (False, True), strict=True)
            if 0 < edge < 1  # nothing lies beyond
        ]
        self._limit = requests_per_false_alarm * len(self._edges)
        self._open: dict[str, list[int]] = {}  # of each request, scores between the cuts

    def count(self, request_id: str, score: float) -> None:
        """Take down one decision's score."""
        if not math.isfinite(score):
            return
        cuts = self.traffic.cuts
        counts = self._open.setdefault(request_id, [0] * (len(cuts) + 1))
        counts[bisect_left(cuts, score)] += 1

    def forget(self, request_id: str) -> None:
        """The request did not come to its end."""
        self._open.pop(request_id, None)

    def finish(self, request_id: str, llm_share: float) -> bool:
        """The request came to its end; whether what drifts has changed by it."""
        counts = self._open.pop(request_id, None)
        if counts is None:
            return False  # nothing was decided in it
        total, above, values = sum(counts), sum(counts), [llm_share]
        for count in counts[:-1]:
            above -= count
            values.append(above / total)
        self.num_requests += 1
        weight = 1 / min(self.num_requests, _RECENT)
        for i, value in enumerate(values):
            before = 0.0 if self.num_requests == 1 else self.recent[i]
            self.recent[i] = before + weight * (value - before)
        for edge in self._edges:
            edge.observe(values[edge.statistic], self._limit)
        passed = {edge.statistic for edge in self._edges if edge.passed}
        drifting = [name for i, name in enumerate(self.traffic.names) if i in passed]
        changed, self.drifting = drifting != self.drifting, drifting
        return changed

    def describe(self) -> str:
        """One line about what drifts."""
        traffic = self.traffic
        if not self.drifting:
            return "requests are like those of calibration again"
        i = traffic.names.index(self.drifting[0])
        others = f" (and {len(self.drifting) - 1} more)" if len(self.drifting) > 1 else ""
        return (
            f"requests are unlike those of calibration: mean {traffic.names[i]} "
            f"{self.recent[i]:.3g} of late, {traffic.low[i]:.3g} to {traffic.high[i]:.3g} on "
            f"{traffic.measured_on}{others}: calibrate again, share and quality may not hold"
        )


def _band(column: np.ndarray) -> tuple[float, float]:
    """Normal interval of a mean, a little wider: by what one more request could change it."""
    mean, count = float(column.mean()), len(column)
    margin = _Z * float(column.std(ddof=1)) / math.sqrt(count) + 1 / count
    return max(0.0, mean - margin), min(1.0, mean + margin)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
