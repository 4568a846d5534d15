"""From a trained module to a router checkpoint: threshold, curve, test results, files."""

import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import r2r_glimp
from r2r_glimp.core import CheckpointError
from r2r_glimp.hub.checkpoint import RouterCheckpoint
from r2r_glimp.hub.config import RouterConfig, command_line, library_versions
from r2r_glimp.routing.mlp import Threshold
from training.data import RouterData
from training.metrics import (
    MIN_RECALL,
    quality_metrics,
    routing_at,
    routing_curve,
    threshold_at_recall,
)
from training.module import RouterModule

THRESHOLD = f"recall-{MIN_RECALL:.2f}"
EXPORT_BATCH = 8192


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to; written as `summary.json` into its folder."""

    path: str
    granularity: str
    threshold: float
    llm_share: float  # on the selection split, at the threshold
    recall: float
    test: dict[str, float]
    epoch: int | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@torch.no_grad()
def score_split(
    module: RouterModule, data: RouterData, split: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, targets and weights of a whole split, on the CPU, [N] each."""
    module.eval()
    parts = []
    for batch in data.batches(split, EXPORT_BATCH):
        moved = module.transfer_batch_to_device(batch, module.device, 0)
        parts.append((module(moved).sigmoid().cpu(), batch.targets_B, batch.weights_B))
    scores, targets, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    return scores, targets, weights


def make_checkpoint(
    module: RouterModule, data: RouterData, training_config: str, untrained: bool = False
) -> RouterCheckpoint:
    """The router with the module's present weights.

    The threshold and the curve are of the selection split, the results of the test split.
    """
    assert module.net is not None
    scores, targets, weights = score_split(module, data, "selection")
    where = (
        f"selection split of {_public(data.path)}: "
        f"{len(scores)} {data.granularity} decisions on labeled text"
    )
    value = threshold_at_recall(scores, targets)
    threshold = Threshold(
        value=value, calibrated_on=where, **routing_at(scores, targets, weights, value)
    )
    config = RouterConfig(
        model=module.net.config,
        thresholds={THRESHOLD: threshold},
        default_threshold=THRESHOLD,
        slm=data.rows.fingerprint("slm"),
        llm=data.rows.fingerprint("llm"),
        trained_on=_facts(data, untrained),
        metrics=_test_results(module, data, value),
        versions={
            **library_versions(),
            "lightning": L.__version__,
            "torchmetrics": torchmetrics.__version__,
        },
    )
    tensors = {
        name: tensor.detach().cpu().float() for name, tensor in module.net.state_dict().items()
    }
    return RouterCheckpoint(
        config, tensors, routing_curve(scores, targets, weights, where), training_config
    )


def load_weights(module: RouterModule, path: str) -> int | None:
    """Put the weights of a training checkpoint into the module; the epoch it was saved after.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content = torch.load(path, map_location=module.device, weights_only=True)
        module.load_state_dict(content["state_dict"])
    except (OSError, RuntimeError, KeyError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: the best checkpoint cannot be read back: {error}") from None
    return int(content["epoch"])


class ExportRouter(L.Callback):
    """At the end of a run, writes the router with the best weights.

    Args:
        folder: where to.
        overwrite: replace a router that is there.
        best: the callback that knows the best weights.
        training_config: YAML.
    """

    def __init__(
        self, folder: Path, overwrite: bool, best: ModelCheckpoint, training_config: str
    ) -> None:
        self.folder, self.overwrite = folder, overwrite
        self.best, self.training_config = best, training_config
        self.checkpoint: RouterCheckpoint | None = None
        self.epoch: int | None = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, RouterModule)
        if self.best.best_model_path:
            self.epoch = load_weights(pl_module, self.best.best_model_path)
        data: RouterData = trainer.datamodule  # type: ignore[attr-defined]
        self.checkpoint = make_checkpoint(pl_module, data, self.training_config)
        self.checkpoint.save_pretrained(self.folder, overwrite=self.overwrite)
        _track(trainer, self.checkpoint, self.folder)


def _track(trainer: L.Trainer, checkpoint: RouterCheckpoint, folder: Path) -> None:
    """The router as a W&B artifact, its curve as a table, its test results as a summary."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            logger.log_metrics(dict(checkpoint.config.metrics), trainer.global_step)
            continue
        import wandb

        curve = checkpoint.curve or {}
        columns: list[Any] = [name for name in curve if name != "measured_on"]
        rows = list(zip(*(curve[name] for name in columns), strict=True))
        logger.experiment.log({"thresholds": wandb.Table(columns, rows)})
        logger.experiment.summary.update(dict(checkpoint.config.metrics))
        artifact = wandb.Artifact(folder.name, type="model", metadata=checkpoint.config.to_dict())
        artifact.add_dir(str(folder))
        logger.experiment.log_artifact(artifact, aliases=["best", "latest"])


def _test_results(module: RouterModule, data: RouterData, threshold: float) -> dict[str, float]:
    scores, targets, weights = score_split(module, data, "test")
    quality = quality_metrics("test/")(scores, targets.long())
    routed = routing_at(scores, targets, weights, threshold)
    results = {name: float(value) for name, value in quality.items()}
    return results | {f"test/{name}": value for name, value in routed.items()}


def _facts(data: RouterData, untrained: bool) -> dict[str, str | int | float]:
    train = data.splits["train"]
    facts: dict[str, str | int | float] = {
        "dataset": _public(data.path),
        "questions": len(data.rows.question_ids),
        "positive": data.positive,
        "rows": len(train.rows),
        "positive_rows": train.num_positive,
        "selection_rows": len(data.splits["selection"].rows),
        "test_rows": len(data.splits["test"].rows),
        "command": command_line("training.fit"),
    }
    if commit := _commit():
        facts["commit"] = commit
    if untrained:
        facts["untrained"] = "yes"
    return facts


def _commit() -> str | None:
    """The commit of the checkout this runs from, None for an installed package."""
    root = Path(r2r_glimp.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _public(path: str) -> str:
    """A dataset's name fit for a model card: an absolute path is nobody's business."""
    return Path(path).name if Path(path).is_absolute() else path
