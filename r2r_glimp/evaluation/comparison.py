"""Paired tests: is one system more often right than another on the same questions?

- a trained router and a training-free one, at one wanted LLM share and granularity
- a system and random decisions at its LLM share
- a system whose threshold was given, and each model alone
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r2r_glimp.evaluation.result import Result
from r2r_glimp.evaluation.statistics import Floats, interval, sign_flip_test
from r2r_glimp.evaluation.system import BASELINES, FREE, ORACLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference in accuracy, with its interval and p-value.

    Attributes:
        target_share: wanted of both, None where a threshold was given.
        threshold: of the first.
    """

    granularity: str
    target_share: float | None
    threshold: float | None
    router: str
    against: str
    difference: float
    low: float
    high: float
    p: float


def compare(
    results: Sequence[Result], questions: Sequence[str], weights: Floats
) -> list[Comparison]:
    """Every pair that says something."""
    found = []
    for one, other in _pairs(results):
        differences = one.right(questions) - other.right(questions)
        low, high = interval(weights @ differences)
        found.append(
            Comparison(
                granularity=str(one.system.granularity),
                target_share=one.system.target_share,
                threshold=one.system.threshold,
                router=one.system.name,
                against=other.system.name,
                difference=float(differences.mean()),
                low=low,
                high=high,
                p=sign_flip_test(differences),
            )
        )
    return found


def _pairs(results: Sequence[Result]) -> Iterator[tuple[Result, Result]]:
    for one in results:
        a = one.system
        if a.granularity is None or a.router in (ORACLE, "random"):
            continue
        for other in results:
            b = other.system
            same_share = (a.granularity, a.target_share) == (b.granularity, b.target_share)
            trained_and_free = a.router not in FREE and b.router in FREE
            if a.target_share is not None and same_share and trained_and_free:
                yield one, other
            elif a.target_share is None and (b.router in BASELINES or b.matches == a.slug):
                yield one, other
