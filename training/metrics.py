"""What a router's scores are worth: thresholds, the share they defer, the recall they reach.

A decision is deferred when its score is above the threshold. Shares count tokens: a step weighs as
much as it is long.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryCalibrationError,
)
from torchmetrics.utilities import dim_zero_cat

MIN_RECALL = 0.95
CURVE_POINTS = 201


def threshold_at_recall(scores: Tensor, targets: Tensor, min_recall: float = MIN_RECALL) -> float:
    """The highest threshold that still defers `min_recall` of the positive rows.

    Halfway between the lowest score that must be deferred and the next lower one, so that rounding
    does not matter.

    Args:
        scores: probabilities, [N].
        targets: 1 where the row should be deferred, [N]; at least one.
    """
    positive = scores[targets > 0].double().sort(descending=True).values
    needed = max(1, math.ceil(min_recall * len(positive) - 1e-9))
    lowest = positive[needed - 1]
    below = scores.double()[scores.double() < lowest]
    return float((lowest + (below.max() if len(below) else 0.0)) / 2)


def share_above(scores: Tensor, weights: Tensor, threshold: float) -> float:
    """Share of the tokens that a threshold defers."""
    return float(weights[scores.double() > threshold].sum() / weights.sum())


def routing_at(
    scores: Tensor, targets: Tensor, weights: Tensor, threshold: float
) -> dict[str, float]:
    """`llm_share`, `recall` and `precision` at a threshold."""
    deferred = scores.double() > threshold
    hits = float(targets[deferred].sum())
    return {
        "llm_share": share_above(scores, weights, threshold),
        "recall": hits / float(targets.sum()),
        "precision": hits / max(1, int(deferred.sum())),
    }


def routing_curve(
    scores: Tensor, targets: Tensor, weights: Tensor, measured_on: str
) -> dict[str, Any]:
    """Columns for `curve.json`, from most to least deferred."""
    ordered = scores.double().sort().values
    places = torch.linspace(0, len(ordered) - 1, CURVE_POINTS).long()
    thresholds = sorted({0.0, *ordered[places].tolist()})
    points = [routing_at(scores, targets, weights, t) for t in thresholds]
    columns = {
        key: [point[key] for point in points] for key in ("llm_share", "recall", "precision")
    }
    return {"measured_on": measured_on, "threshold": thresholds, **columns}


class ShareAtRecall(Metric):
    """Share of the tokens deferred at the threshold that reaches a recall of `MIN_RECALL`."""

    full_state_update = False
    higher_is_better = False
    scores: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("scores", "targets", "weights"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor, weights: Tensor) -> None:
        self.scores.append(scores)
        self.targets.append(targets)
        self.weights.append(weights)

    def compute(self) -> Tensor:
        scores, targets, weights = map(dim_zero_cat, (self.scores, self.targets, self.weights))
        share = share_above(scores, weights, threshold_at_recall(scores, targets))
        return torch.tensor(share, device=scores.device)


def quality_metrics(prefix: str) -> MetricCollection:
    """Average precision, AUROC, and calibration error, of (scores, integer targets)."""
    return MetricCollection(
        {
            "ap": BinaryAveragePrecision(),
            "auroc": BinaryAUROC(),
            "calibration_error": BinaryCalibrationError(),
        },
        prefix=prefix,
    )
