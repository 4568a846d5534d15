"""Calibration: a threshold for a wanted LLM share.

Shares are measured while routing, because routed text differs from either model's own: what the LLM
writes changes what the SLM is unsure of next. Who routes is not known here; a `Measure` does it.

    share ▲ ●                       ● measured. Between two points the share is taken to fall with
          │    ╲                    the number of decisions whose score the threshold passes, not
          │      ●                  with the threshold itself, which may span orders of magnitude.
     ─ ─ ─│─ ─ ─ ─ ╲ ─ ─ target
          └──────────●──▶ threshold
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r2r_glimp.core import UsageError
from r2r_glimp.routing.routers import Router

PILOT = 8  # the search begins on one prompt in so many
MIN_PILOT = 128  # and on no fewer than these
GRID = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares a curve shows whatever was asked for
_RESAMPLES = 2000
_DRAWN_AT_ONCE = 200_000  # requests, of all the resamples that are made together
_MIN_FRACTION = 0.02  # of the decisions between two points: closer to one of them is no progress


@dataclass(frozen=True, eq=False)  # no slots: the interval is kept
class Measurement:
    """Requests routed under one threshold.

    Attributes:
        threshold: a score above it deferred.
        llm_tokens, tokens: of each request, LLM-written and generated tokens, [requests].
        scores: of all decisions, sorted, [decisions].
        firsts: LLM share and decisions' scores of each request's first completion.
    """

    threshold: float
    llm_tokens: NDArray[np.int64]
    tokens: NDArray[np.int64]
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    firsts: Sequence[tuple[float, Sequence[float]]] = ()

    @property
    def share(self) -> float:
        """LLM-written tokens / generated tokens, of all requests together."""
        return float(self.llm_tokens.sum() / max(1, self.tokens.sum()))

    @property
    def num_requests(self) -> int:
        return len(self.tokens)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of the share (percentiles); requests are what is drawn again."""
        rng = np.random.default_rng(0)
        shares: list[float] = []
        rows = max(1, _DRAWN_AT_ONCE // self.num_requests)
        while len(shares) < _RESAMPLES:
            drawn = rng.integers(self.num_requests, size=(rows, self.num_requests))
            llm_tokens, tokens = self.llm_tokens[drawn].sum(1), self.tokens[drawn].sum(1)
            shares += (llm_tokens / np.maximum(1, tokens)).tolist()
        low, high = np.quantile(shares[:_RESAMPLES], [0.025, 0.975])
        return float(low), float(high)


Measure = Callable[[Sequence[float], bool], list[Measurement]]
"""Route under several thresholds at once: on every prompt, or (True) on the pilot's alone."""


class ShareCurve:
    """Measured points, in the order of their thresholds."""

    def __init__(self, points: Iterable[Measurement] = ()) -> None:
        self.points: list[Measurement] = []
        self.add(points)

    def add(self, points: Iterable[Measurement]) -> None:
        """Take points in; one of more requests takes the place of another at its threshold."""
        best = {point.threshold: point for point in self.points}
        for point in points:
            known = best.get(point.threshold)
            if known is None or known.num_requests <= point.num_requests:
                best[point.threshold] = point
        self.points = sorted(best.values(), key=lambda point: point.threshold)

    def nearest(self, target: float) -> Measurement:
        """The point whose share is nearest to a target."""
        return min(self.points, key=lambda point: abs(point.share - target))

    def between(self, target: float) -> float | None:
        """A threshold whose share should be nearer to the target than any measured one's.

        None if the target lies beyond the measured shares, or no score lies between the points on
        either side of it.
        """
        brackets = [
            (one, two)
            for one, two in pairwise(self.points)
            if (one.share - target) * (two.share - target) <= 0 and one.share != two.share
        ]
        if not brackets:
            return None
        # Shares need not fall everywhere: of several crossings the one known best.
        one, two = min(brackets, key=lambda pair: abs(pair[0].share - pair[1].share))
        inner = np.concatenate([one.scores, two.scores])
        inner = np.sort(inner[(inner > one.threshold) & (inner < two.threshold)])
        if not len(inner):
            return None
        fraction = (target - one.share) / (two.share - one.share)
        fraction = min(max(fraction, _MIN_FRACTION), 1 - _MIN_FRACTION)
        score = inner[int(fraction * len(inner))]
        above, below = inner[inner > score], inner[inner < score]
        if not len(above) and not len(below):
            return None
        other = above[0] if len(above) else below[-1]
        # Halfway between two scores, so that rounding does not matter.
        return float((score + other) / 2)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a search came to.

    Attributes:
        found: for each target, the point nearest to it, measured on every prompt.
        curve: all points.
    """

    found: dict[float, Measurement]
    curve: ShareCurve


def search_shares(
    measure: Measure,
    targets: Sequence[float],
    *,
    low: float,
    high: float,
    tolerance: float = 0.02,
    max_steps: int = 8,
    pilot: bool = True,
    why_not: Callable[[float, Measurement], str] | None = None,
) -> Calibration:
    """The thresholds whose measured LLM shares are nearest to the targets, all searched at once.

    A pilot on some of the prompts gives the curve and a first guess; the guess is then corrected
    on all of them.

    Args:
        measure: routes the prompts.
        targets: wanted shares, each above 0 and below 1.
        low, high: thresholds between which to look.
        tolerance: relative error of a share that is good enough.
        max_steps: rounds of measurements at most, in the pilot and after it.
        pilot: begin on the pilot's prompts; False takes every prompt from the beginning.
        why_not: what to say of a target that is beyond the shares at `low` and `high`, given the
            nearer of the two.

    Raises:
        UsageError: a target cannot be reached by any threshold.
    """
    curve = ShareCurve(measure([low, high], pilot))
    ends = list(curve.points)
    for target in targets:
        nearer = curve.nearest(target)
        if not _within(curve, target):
            reason = f"shares go from {ends[-1].share:.1%} to {ends[0].share:.1%}"
            raise UsageError(why_not(target, nearer) if why_not else reason)
    guesses = [guess for share in GRID if (guess := curve.between(share)) is not None]
    curve.add(measure(sorted(set(guesses)), pilot) if guesses else [])
    _refine(curve, measure, targets, tolerance=tolerance, max_steps=max_steps, pilot=pilot)
    if not pilot:
        return Calibration({target: curve.nearest(target) for target in targets}, curve)
    # Of the pilot, only what lies far away brackets the targets: its noise must not.
    whole = ShareCurve(ends)
    first = sorted({curve.nearest(target).threshold for target in targets} - {low, high})
    whole.add(measure(first or [low, high], False))
    _refine(whole, measure, targets, tolerance=tolerance, max_steps=max_steps, pilot=False)
    measured = ShareCurve(p for p in whole.points if p.num_requests > ends[0].num_requests)
    curve.add(measured.points)
    return Calibration({target: measured.nearest(target) for target in targets}, curve)


def _refine(
    curve: ShareCurve,
    measure: Measure,
    targets: Sequence[float],
    *,
    tolerance: float,
    max_steps: int,
    pilot: bool,
) -> None:
    """Measure between the points around each target until all are met, or nothing is between."""
    for _ in range(max_steps):
        missed = [t for t in targets if abs(curve.nearest(t).share - t) > tolerance * t]
        wanted = {guess for t in missed if (guess := curve.between(t)) is not None}
        wanted -= {point.threshold for point in curve.points}
        if not wanted:
            return
        curve.add(measure(sorted(wanted), pilot))


def _within(curve: ShareCurve, target: float) -> bool:
    shares = [point.share for point in curve.points]
    return min(shares) <= target <= max(shares)


def pilot_of(prompts: Sequence[Any]) -> list[Any]:
    """The prompts of the pilot, spread over all; all of them where they are few."""
    step = min(PILOT, len(prompts) // MIN_PILOT)
    return list(prompts[:: max(1, step)])


def share_for_parameters(target: float, slm: float, llm: float, router: float = 0.0) -> float:
    """The LLM share at which `slm + router + share x llm` parameters work on an average token.

    Raises:
        UsageError: no share between 0 and 1 gives that.
    """
    share = (target - slm - router) / llm
    if not 0 < share < 1:
        least, most = slm + router, slm + router + llm
        raise UsageError(
            f"{format_count(target)} parameters on average cannot be had: this pair takes more "
            f"than {format_count(least)} (the SLM and the router) and less than "
            f"{format_count(most)}"
        )
    return share


def parse_count(text: str | float) -> float:
    """`1.5B`, `300M`, `20K`, or a plain number: of billions below 10,000, else of parameters.

    Raises:
        UsageError: it is not a positive number.
    """
    shown, units = str(text).strip(), {"K": 1e3, "M": 1e6, "B": 1e9}
    unit = units.get(shown[-1:].upper())
    try:
        value = float(shown[:-1] if unit else shown)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{text!r} is no number of parameters: give 1.5B, 300M or 20K")
    return value * (unit or (1e9 if value < 1e4 else 1))


def format_count(value: float) -> str:
    """A number of parameters for people: `1.54B`, `127K`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def threshold_range(router: Router, vocab_size: int) -> tuple[float, float]:
    """Thresholds below and above which nothing changes."""
    if router.name != "entropy":
        return 0.0, 1.0
    return 0.0, math.log(getattr(router, "top_k", None) or vocab_size)
