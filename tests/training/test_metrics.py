"""Thresholds and shares, by hand and as an invariant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics import (
    ShareAtRecall,
    routing_at,
    routing_curve,
    share_above,
    threshold_at_recall,
)

SCORES = torch.tensor([0.9, 0.8, 0.6, 0.4, 0.3, 0.1])
TARGETS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])


def test_threshold_at_recall_by_hand():
    assert threshold_at_recall(SCORES, TARGETS, 1.0) == pytest.approx(0.2)
    assert threshold_at_recall(SCORES, TARGETS, 0.66) == pytest.approx(0.5)
    assert threshold_at_recall(SCORES, TARGETS, 0.3) == pytest.approx(0.85)


def test_shares_count_tokens():
    weights = torch.tensor([1.0, 1.0, 8.0, 1.0, 1.0, 8.0])
    assert share_above(SCORES, weights, 0.5) == pytest.approx(10 / 20)
    at = routing_at(SCORES, TARGETS, weights, 0.5)
    assert at == pytest.approx({"llm_share": 0.5, "recall": 2 / 3, "precision": 2 / 3})


def test_curve_goes_from_all_to_nothing():
    curve = routing_curve(SCORES, TARGETS, torch.ones(6), "here")
    assert curve["threshold"] == sorted(curve["threshold"])
    assert (curve["llm_share"][0], curve["llm_share"][-1]) == (1.0, 0.0)
    assert curve["recall"] == sorted(curve["recall"], reverse=True)
    assert curve["measured_on"] == "here"


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(2**-20, 1, width=32), st.booleans()), min_size=1, max_size=40),
    st.floats(0.01, 1),
)
def test_the_threshold_reaches_its_recall_and_no_more(rows, min_recall):
    scores = torch.tensor([score for score, _ in rows])
    targets = torch.tensor([float(positive) for _, positive in rows])
    if not targets.any():
        return
    threshold = threshold_at_recall(scores, targets, min_recall)
    assert (
        routing_at(scores, targets, torch.ones(len(rows)), threshold)["recall"] >= min_recall - 1e-6
    )
    higher = scores[scores.double() > threshold].min()  # the next higher threshold misses it
    fewer = routing_at(scores, targets, torch.ones(len(rows)), float(higher))
    assert fewer["recall"] < min_recall


def test_share_at_recall_gathers_batches():
    metric = ShareAtRecall()
    for part in (slice(0, 2), slice(2, 6)):
        metric.update(SCORES[part], TARGETS[part], torch.ones(6)[part])
    assert float(metric.compute()) == pytest.approx(5 / 6)
