"""Two Gaussians by EM: found where they are, refused where there is only one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2r_glimp.core import DataError
from r2r_glimp.routing.mixture import (
    MIN_SCORES,
    Mixture,
    fit_mixture,
    from_scale,
    mixture_threshold,
    to_scale,
)


def draw(weight: float, means: tuple, stds: tuple, count: int = 4000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    upper = rng.random(count) < weight
    return np.where(
        upper, rng.normal(means[1], stds[1], count), rng.normal(means[0], stds[0], count)
    )


def test_both_are_found():
    mixture = fit_mixture(draw(0.3, (-6.0, -1.0), (1.0, 0.5)))
    assert mixture.weights == pytest.approx((0.7, 0.3), abs=0.03)
    assert mixture.means == pytest.approx((-6, -1), abs=0.1)
    assert mixture.stds == pytest.approx((1, 0.5), abs=0.05)
    assert mixture.bic_gain > 1000


def test_the_likelihood_is_that_of_the_densities():
    values = draw(0.4, (0.0, 3.0), (1.0, 0.5), 500)
    mixture = fit_mixture(values)
    assert mixture.log_likelihood == pytest.approx(np.log(mixture.density(values).sum(0)).sum())


@settings(max_examples=50, deadline=None)
@given(
    weight=st.floats(0.1, 0.9),
    gap=st.floats(2, 8),
    first=st.floats(0.3, 1.5),
    second=st.floats(0.3, 1.5),
)
def test_posteriors_cross_at_the_crossing(weight, gap, first, second):
    mixture = Mixture((1 - weight, weight), (0.0, gap), (first, second), 0.0, 1.0)
    border = mixture.crossing()
    if border is None:  # one outweighs the other all the way
        inner = mixture.density(np.linspace(0, gap, 1000))
        assert (inner[0] > inner[1]).all() or (inner[0] < inner[1]).all()
        return
    assert 0 < border < gap
    lower, upper = mixture.density(np.array([border]))[:, 0]
    assert lower == pytest.approx(upper, rel=1e-6)


def test_equal_deviations_have_one_crossing():
    mixture = Mixture((0.5, 0.5), (0.0, 4.0), (1.0, 1.0), 0.0, 1.0)
    assert mixture.crossing() == pytest.approx(2.0)
    assert Mixture((1 - 1e-9, 1e-9), (0.0, 1.0), (1.0, 1.0), 0.0, 1.0).crossing() is None


def test_a_threshold_between_two_crowds_of_scores():
    entropies = np.exp(draw(0.2, (-6.0, -0.5), (1.0, 0.4)))
    threshold, _ = mixture_threshold(entropies, "log")
    assert math.exp(-3.5) < threshold < math.exp(-1.2)
    assert (entropies > threshold).mean() == pytest.approx(0.2, abs=0.02)
    probabilities = 1 / (1 + np.exp(-draw(0.1, (-5.0, 3.0), (1.0, 1.0))))
    threshold, _ = mixture_threshold(probabilities, "logit")
    assert 0.05 < threshold < 0.95


def test_scores_at_the_ends_of_their_range_are_taken():
    scores = np.concatenate([np.zeros(300), np.ones(100), np.linspace(0.2, 0.8, 100)])
    for scale in ("linear", "log", "logit"):
        assert np.isfinite(to_scale(scores, scale)).all()
        threshold, _ = mixture_threshold(scores, scale)
        assert 0 < threshold < 1


@pytest.mark.parametrize("scale", ["linear", "log", "logit"])
def test_scales_invert(scale):
    scores = np.array([1e-6, 0.1, 0.5, 0.9])
    assert np.allclose(from_scale(to_scale(scores, scale), scale), scores)


def test_one_crowd_is_refused():
    with pytest.raises(DataError, match="one crowd.*--target_llm_share"):
        mixture_threshold(np.exp(draw(0.0, (-3.0, 0.0), (1.0, 1.0), 2000)), "log")


def test_too_few_or_all_alike():
    with pytest.raises(DataError, match="49 scores are too few"):
        fit_mixture(np.arange(MIN_SCORES - 1.0))
    with pytest.raises(DataError, match="all scores are alike"):
        fit_mixture(np.full(100, 0.5))


def test_a_component_does_not_collapse_onto_one_value():
    values = np.concatenate([np.full(500, 2.0), draw(0.0, (0.0, 0.0), (1.0, 1.0), 500)])
    assert min(fit_mixture(values).stds) > 0
