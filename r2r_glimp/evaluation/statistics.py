"""Intervals and tests over questions, which are what is drawn again; repeats of one stay together.

Shape suffixes: S systems, Q questions, B resamples.
"""

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000
_FLIPS = 10_000
Floats = NDArray[np.float64]


def resample_weights(num_questions: int, seed: int = 0) -> Floats:
    """How often each question is drawn in each of the resamples, divided by Q, [B, Q].

    One matrix for all systems keeps their differences paired.
    """
    rng = np.random.default_rng(seed)
    even = np.full(num_questions, 1 / num_questions)
    return rng.multinomial(num_questions, even, size=_RESAMPLES) / num_questions


def interval(resampled: Floats) -> tuple[float, float]:
    """95% percentile interval of a resampled figure, [B]."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def sign_flip_test(differences_Q: Floats, seed: int = 0) -> float:
    """Two-sided p-value of a paired test: is the mean difference per question zero?

    Under the null hypothesis each difference could as well have the other sign; for right or wrong
    answers this is McNemar's test, by simulation. Never below 1 / (flips + 1).
    """
    told = differences_Q[differences_Q != 0]
    if not len(told):
        return 1.0
    rng = np.random.default_rng(seed)
    observed, beyond = abs(told.sum()), 0
    for _ in range(10):  # in parts, for memory's sake
        signs = rng.choice([-1.0, 1.0], size=(_FLIPS // 10, len(told)))
        beyond += int((np.abs(signs @ told) >= observed - 1e-12).sum())
    return (beyond + 1) / (_FLIPS + 1)
