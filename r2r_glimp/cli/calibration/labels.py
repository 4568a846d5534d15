"""What a router's scores are worth on labeled text: recall and precision of its thresholds."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from r2r_glimp.core import DataError, Granularity, UsageError
from r2r_glimp.routing.mlp import MLPRouter
from r2r_glimp.routing.routers import EntropyRouter, Router

if TYPE_CHECKING:
    from r2r_glimp.hub.checkpoint import RouterCheckpoint
    from r2r_glimp.models.pair import AnyModel
    from training.data import RouterData

_BATCH = 8192


@dataclass(frozen=True, slots=True)
class Labels:
    """Scored decisions of a labeled dataset.

    Attributes:
        name: what to call them.
        scores, targets, weights: of each decision, its score, 1.0 where it should be deferred, and
            the tokens that hang on it, [N].
    """

    name: str
    scores: Tensor
    targets: Tensor
    weights: Tensor

    def threshold_at(self, recall: float) -> float:
        """The highest threshold that defers this share of what should be."""
        from training.metrics import threshold_at_recall

        return threshold_at_recall(self.scores, self.targets, recall)

    def quality_at(self, threshold: float) -> tuple[float, float]:
        """Recall and precision of a threshold."""
        from training.metrics import routing_at

        at = routing_at(self.scores, self.targets, self.weights, threshold)
        return at["recall"], at["precision"]

    def curve_thresholds(self) -> list[float]:
        """Thresholds at which recall and precision change, evenly over the decisions."""
        from training.metrics import routing_curve

        return routing_curve(self.scores, self.targets, self.weights, "")["threshold"]


def load_labels(
    path: str,
    router: Router,
    granularity: Granularity,
    slm: "AnyModel",
    checkpoint: "RouterCheckpoint | None",
) -> Labels:
    """Score a labeled dataset. Of the one a router was trained on, the selection split alone.

    Raises:
        UsageError: training's packages are missing, or this router's scores are not in a dataset.
        DataError: the dataset cannot be read, or is another SLM's.
    """
    try:
        from training.data import RouterData
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--labels needs {error.name}, which is not installed: pip install 'r2r_glimp[train]'"
        ) from None
    column = None if isinstance(router, MLPRouter) else _column(router)
    options = {} if checkpoint is None else _split_options(checkpoint)
    data = RouterData(path, granularity=granularity, positive=_positive(checkpoint), **options)
    data.setup()
    known = checkpoint is not None and _trained_on(checkpoint, data)
    splits = ("selection",) if known else ("train", "selection", "test")
    fingerprint = data.rows.fingerprint("slm")
    mismatch = None if fingerprint is None else fingerprint.mismatch(slm.fingerprint)
    if mismatch is not None:
        raise DataError(f"{path} was labeled with another SLM: {mismatch}")
    chosen = [data.splits[name] for name in splits]
    rows, targets, weights = (
        np.concatenate([getattr(split, name) for split in chosen])
        for name in ("rows", "targets", "weights")
    )
    if isinstance(router, MLPRouter):
        scores = _network_scores(router, data, rows, slm)
    else:
        assert column is not None
        scores = torch.from_numpy(getattr(data.rows, column)[rows])
    part = "selection split of " if splits == ("selection",) else ""
    name = f"{part}{Path(path).name}: {len(rows):,} {granularity} decisions on labeled text"
    return Labels(name, scores, torch.from_numpy(targets), torch.from_numpy(weights))


def _column(router: Router) -> str:
    """The column that holds a training-free router's scores."""
    whole = not isinstance(router, EntropyRouter) or router.top_k is None
    if router.name in ("entropy", "margin") and whole:
        return router.name
    raise UsageError(
        f"--labels says nothing about router {router.name}: a labeled dataset holds the entropy "
        "of the full vocabulary, the margin, and what a trained router looks at"
    )


@torch.inference_mode()
def _network_scores(
    router: MLPRouter, data: "RouterData", rows: np.ndarray, slm: "AnyModel"
) -> Tensor:
    features = router.config.features
    if features.hidden_size != data.rows.hidden_size or features.top_k_logits > data.rows.top_k:
        raise DataError(
            f"{data.path}: hidden states are {data.rows.hidden_size} wide and {data.rows.top_k} "
            f"logits were kept, this router looks at {features.hidden_size} and "
            f"{features.top_k_logits}"
        )
    if features.hidden and features.hidden_layer != data.rows.hidden_layer:
        raise DataError(
            f"{data.path}: hidden states are of layer {data.rows.hidden_layer or 'last'}, this "
            f"router looks at layer {features.hidden_layer or 'last'}"
        )
    embedding: Any = slm.model.get_input_embeddings()
    device = next(router.net.parameters()).device
    parts = []
    for start in range(0, len(rows), _BATCH):
        observation = data.rows.observe(rows[start : start + _BATCH], features)
        inputs = features.inputs(observation, embedding.weight.cpu())
        moved = {name: tensor.to(device) for name, tensor in inputs.items()}
        parts.append(router.net(moved).sigmoid().cpu())
    return torch.cat(parts)


def _trained_on(checkpoint: "RouterCheckpoint", data: "RouterData") -> bool:
    """Whether a router was trained on this dataset, as far as its name and size tell."""
    facts = checkpoint.config.trained_on
    same_name = Path(str(facts.get("dataset", ""))).name == Path(data.path).name
    return same_name and facts.get("questions") == len(data.rows.question_ids)


def _split_options(checkpoint: "RouterCheckpoint") -> dict[str, Any]:
    """How the trainer split the questions, as its configuration says."""
    import yaml

    told = yaml.safe_load(checkpoint.training_config or "") or {}
    data = told.get("data", {}) if isinstance(told, dict) else {}
    return {name: data[name] for name in ("selection", "test", "split_seed") if name in data}


def _positive(checkpoint: "RouterCheckpoint | None") -> Any:
    return (
        "divergent"
        if checkpoint is None
        else checkpoint.config.trained_on.get("positive", "divergent")
    )
