"""A threshold without labels: two Gaussians fitted to the scores, the border where they cross.

Where a small model is sure its scores crowd in one place, where it is not in another. Fitting both
crowds by expectation maximisation and drawing the line where a score belongs to either with equal
probability is the idea of STEER (arXiv 2511.06190), which does it with confidences of steps; here
it is done with the logarithm of any score, H_init among them.

    density ▲   ╭╮
            │  ╭╯╰╮        ╭─╮
            │ ╭╯  ╰╮  │  ╭─╯ ╰─╮
            └─────────┴──────────▶ log score
                   threshold
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from r2r_glimp.core import DataError

Scale = Literal["linear", "log", "logit"]

MIN_SCORES = 50
_FLOOR = 1e-8  # scores closer to the end of their range count as this close
_FIRST_SPLITS = (0.5, 0.7, 0.85, 0.95)  # quantiles EM starts from; the best fit is kept
_MAX_ITERATIONS = 1000
_MIN_STD = 1e-3  # of the deviation of all values: a component must not collapse onto one of them
_HINT = "ask for --target_llm_share instead"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Two weighted Gaussians, the lower one first.

    Attributes:
        weights, means, stds: of each, on the scale they were fitted on.
        log_likelihood: of the values, natural logarithm, summed.
        bic_gain: by how much they beat a single Gaussian in the Bayesian information criterion.
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    stds: tuple[float, float]
    log_likelihood: float
    bic_gain: float

    def density(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Density of each of the two, weighted, [2, N]."""
        return np.exp(_log_joint(values, *map(np.array, (self.weights, self.means, self.stds))))

    def crossing(self) -> float | None:
        """Where a value belongs to either with equal probability, between the means; None if one
        of them outweighs the other all the way."""
        (w1, w2), (m1, m2), (s1, s2) = self.weights, self.means, self.stds
        # log(w1 N1) - log(w2 N2) = a x² + b x + c
        a = 0.5 / s2**2 - 0.5 / s1**2
        b = m1 / s1**2 - m2 / s2**2
        c = 0.5 * (m2 / s2) ** 2 - 0.5 * (m1 / s1) ** 2 + math.log(w1 * s2 / (w2 * s1))
        roots = np.roots([a, b, c]) if abs(a) > 1e-12 else np.array([-c / b])
        inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and m1 < r.real < m2]
        return inside[0] if inside else None


def fit_mixture(values: NDArray[np.float64]) -> Mixture:
    """Two Gaussians by expectation maximisation, from several starting points.

    Args:
        values: [N], finite.

    Raises:
        DataError: too few values, or all alike.
    """
    if len(values) < MIN_SCORES:
        raise DataError(f"{len(values)} scores are too few to fit a mixture to: more prompts")
    spread = float(values.std())
    if spread < 1e-9:
        raise DataError(f"all scores are alike, so they do not split in two: {_HINT}")
    fits = [_maximise(values, start, _MIN_STD * spread) for start in _FIRST_SPLITS]
    likelihood, weights, means, stds = max(fits, key=lambda fit: fit[0])
    order = np.argsort(means)
    single = float(_log_normal(values, values.mean(), spread).sum())
    # Five numbers describe two Gaussians, two describe one.
    bic_gain = 2 * (likelihood - single) - 3 * math.log(len(values))
    lower, upper = (int(i) for i in order)
    return Mixture(
        weights=(float(weights[lower]), float(weights[upper])),
        means=(float(means[lower]), float(means[upper])),
        stds=(float(stds[lower]), float(stds[upper])),
        log_likelihood=likelihood,
        bic_gain=bic_gain,
    )


def mixture_threshold(scores: NDArray[np.float64], scale: Scale) -> tuple[float, Mixture]:
    """The score at which the two crowds of scores meet.

    Args:
        scores: of decisions, [N].
        scale: of the fit; `log` suits entropies and margins, `logit` probabilities.

    Returns:
        The threshold, on the scores' own scale, and the mixture on the other.

    Raises:
        DataError: too few scores, or they do not split in two.
    """
    mixture = fit_mixture(to_scale(scores, scale))
    border = mixture.crossing()
    if border is None or mixture.bic_gain <= 0:
        raise DataError(f"the scores are one crowd, they do not split in two: {_HINT}")
    return float(from_scale(np.array([border]), scale)[0]), mixture


def to_scale(scores: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    """Scores on the scale that is fitted; the ends of their range are kept finite."""
    if scale == "linear":
        return scores
    high = 1 - _FLOOR if scale == "logit" else np.inf
    inside = np.clip(scores, _FLOOR, high)
    return np.log(inside) - (np.log1p(-inside) if scale == "logit" else 0.0)


def from_scale(values: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    """The inverse of `to_scale`."""
    if scale == "linear":
        return values
    return 1 / (1 + np.exp(-values)) if scale == "logit" else np.exp(values)


Fit = tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _maximise(values: NDArray[np.float64], split: float, min_std: float) -> Fit:
    """EM from two crowds cut at a quantile: likelihood, weights, means, deviations."""
    upper = (values > np.quantile(values, split)).astype(np.float64)
    shares = np.stack([1 - upper, upper])
    before, likelihood = -math.inf, -math.inf
    for _ in range(_MAX_ITERATIONS):
        totals = np.maximum(shares.sum(1), 1e-9)
        weights = totals / totals.sum()
        means = (shares * values).sum(1) / totals
        squares = (shares * (values - means[:, None]) ** 2).sum(1) / totals
        stds = np.maximum(np.sqrt(squares), min_std)
        joint = _log_joint(values, weights, means, stds)
        evidence = np.logaddexp(joint[0], joint[1])
        shares = np.exp(joint - evidence)
        before, likelihood = likelihood, float(evidence.sum())
        if abs(likelihood - before) <= 1e-9 * abs(likelihood):
            break
    return likelihood, weights, means, stds


def _log_joint(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    means: NDArray[np.float64],
    stds: NDArray[np.float64],
) -> NDArray[np.float64]:
    """log(weight x density), [2, N]."""
    return np.stack(
        [
            math.log(w) + _log_normal(values, m, s)
            for w, m, s in zip(weights, means, stds, strict=True)
        ]
    )


def _log_normal(values: NDArray[np.float64], mean: float, std: float) -> NDArray[np.float64]:
    return -0.5 * ((values - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
