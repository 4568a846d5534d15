"""The trainer's view of a router: features, loss, optimizer. The network knows no Lightning."""

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from r2r_glimp.core import DataError, Granularity, UsageError
from r2r_glimp.routing.features import FeatureSpec
from r2r_glimp.routing.mlp import MLPConfig, MLPRouterNet, MLPSize
from training.data import Batch, RouterData
from training.metrics import ShareAtRecall, quality_metrics

STATISTICS_BATCH = 8192


class RouterModule(L.LightningModule):
    """Trains an `MLPRouterNet` with class-weighted binary cross-entropy.

    Positives weigh `pos_weight`, but the network's logit is that of the true rate: the loss looks
    at logit + ln(pos_weight), so the score stays a probability, which it would not with the weight
    alone.

    Args:
        granularity: linked to the data's.
        hidden: look at the hidden state that the dataset kept, the last one or a layer's.
        top_k_logits: look at so many of the highest logits; 0 for none.
        candidate: look at the embedding of the SLM's candidate token.
        entropy: look at the entropy of the SLM's distribution.
        margin: look at 1 - (p1 - p2).
        hidden_size: of the SLM; None is what the dataset has, anything else must agree with it.
        width: of the network.
        blocks: residual blocks.
        expansion: inner width of a block / width.
        dropout: inside the blocks.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: `cosine` to zero over the run, or `constant`, both after the warm-up.
        warmup: share of the steps over which the learning rate rises.
        pos_weight: weight of a positive row; None is negatives / positives of the training split.
        seed: of dropout.

    Raises:
        UsageError: a number is out of range, or the network would see nothing.
    """

    embedding_VH: Tensor

    def __init__(
        self,
        granularity: Granularity = "token",
        hidden: bool = True,
        top_k_logits: int = 32,
        candidate: bool = True,
        entropy: bool = True,
        margin: bool = True,
        hidden_size: int | None = None,
        width: int = 64,
        blocks: int = 2,
        expansion: int = 4,
        dropout: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup: float = 0.05,
        pos_weight: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        size = MLPSize(width=width, blocks=blocks, expansion=expansion, dropout=dropout)
        for name, value, high in (
            ("lr", lr, 10),
            ("weight_decay", weight_decay, 10),
            ("warmup", warmup, 1),
        ):
            if not 0 <= value <= high:
                raise UsageError(f"model.{name}={value} is out of range: 0 to {high}")
        if pos_weight is not None and not (pos_weight > 0 and math.isfinite(pos_weight)):
            raise UsageError(f"model.pos_weight={pos_weight} is out of range: above 0")
        self.size = size
        self.net: MLPRouterNet | None = None
        self.quality = quality_metrics("selection/")
        self.share_at_recall = ShareAtRecall()

    def prepare(self, data: RouterData) -> None:
        """Build the network for the data, and standardise its inputs; the second call does nothing.

        Raises:
            DataError: a row is not finite, or the data has no such features.
        """
        if self.net is not None:
            return
        hp: Any = self.hparams
        rows = data.rows
        if hp.hidden_size not in (None, rows.hidden_size):
            raise DataError(
                f"{data.path}: hidden states are {rows.hidden_size} wide, "
                f"model.hidden_size={hp.hidden_size}: null takes what the dataset has"
            )
        if hp.top_k_logits > rows.top_k:
            raise DataError(
                f"{data.path}: {rows.top_k} logits were kept, "
                f"model.top_k_logits={hp.top_k_logits} wants more: lower it, or label again"
            )
        features = FeatureSpec(
            hidden_size=rows.hidden_size,
            hidden=hp.hidden,
            hidden_layer=rows.hidden_layer if hp.hidden else None,
            top_k_logits=hp.top_k_logits,
            candidate=hp.candidate,
            entropy=hp.entropy,
            margin=hp.margin,
        )
        data.spec = features
        embedding_VH = data.input_embedding() if features.candidate else torch.empty(0)
        self.register_buffer("embedding_VH", embedding_VH, persistent=False)
        self.net = MLPRouterNet(
            MLPConfig(granularity=hp.granularity, features=features, size=self.size)
        )
        train = data.splits["train"]
        ratio = (len(train.rows) - train.num_positive) / train.num_positive
        self.pos_weight = ratio if hp.pos_weight is None else hp.pos_weight
        torch.nn.init.constant_(self.net.head.bias, -math.log(self.pos_weight))
        self._standardise(data)

    def setup(self, stage: str) -> None:
        self.prepare(self.trainer.datamodule)  # type: ignore[attr-defined]

    def forward(self, batch: Batch) -> Tensor:
        """Logits, float32 [B]."""
        assert self.net is not None
        features = self.net.config.features
        return self.net(features.inputs(batch.observation, self.embedding_VH))

    def loss(self, logits_B: Tensor, batch: Batch) -> Tensor:
        """Class-weighted binary cross-entropy; raises DataError when it is not finite."""
        weight = torch.tensor(self.pos_weight, device=logits_B.device)
        loss = binary_cross_entropy_with_logits(
            logits_B + weight.log(), batch.targets_B, pos_weight=weight
        )
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss is {loss.item()} at step {self.global_step}: "
                f"lower model.lr={self.hparams['lr']}"
            )
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # A function of (seed, step, process): a resumed run drops what it would have dropped.
        torch.manual_seed(
            (self.hparams["seed"] * 1_000_003 + self.global_step) * 4096 + self.global_rank
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch), batch)
        self.log("train/loss", loss, batch_size=len(batch.targets_B), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits_B, size = self(batch), len(batch.targets_B)
        scores_B = logits_B.sigmoid()
        self.quality.update(scores_B, batch.targets_B.long())
        self.share_at_recall.update(scores_B, batch.targets_B, batch.weights_B)
        loss = self.loss(logits_B, batch)
        self.log("selection/loss", loss, batch_size=size, on_epoch=True, sync_dist=True)
        self.log_dict(self.quality, batch_size=size, on_epoch=True, prog_bar=True)
        self.log(
            "selection/share_at_recall_95", self.share_at_recall, batch_size=size, on_epoch=True
        )

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        assert self.net is not None
        hp: Any = self.hparams
        optimizer = AdamW(self.net.parameters(), lr=hp.lr, weight_decay=hp.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        warmup = max(1, round(hp.warmup * steps)) if math.isfinite(steps) else 1

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if hp.schedule == "constant":
                return 1.0
            return 0.5 * (
                1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))
            )

        schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @torch.no_grad()
    def _standardise(self, data: RouterData) -> None:
        """Mean and deviation of the training split; looks at every row of every split."""
        assert self.net is not None
        features = self.net.config.features
        count, total, squares = (
            0,
            torch.zeros(features.dim).double(),
            torch.zeros(features.dim).double(),
        )
        for name, split in data.splits.items():
            for start in range(0, len(split.rows), STATISTICS_BATCH):
                rows = split.rows[start : start + STATISTICS_BATCH]
                inputs = features.inputs(data.rows.observe(rows, features), self.embedding_VH)
                x = torch.cat(list(inputs.values()), -1)
                bad = (~torch.isfinite(x)).any(1).nonzero()
                if len(bad):
                    row = int(bad[0])
                    what = next(n for n, v in inputs.items() if not torch.isfinite(v[row]).all())
                    at = data.rows.name_of(int(rows[row]))
                    raise DataError(
                        f"{data.path}: {at} has a NaN or infinite {what}: label it again"
                    )
                if name == "train":
                    count += len(x)
                    total += x.sum(0, dtype=torch.float64)
                    squares += x.double().square().sum(0)
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.net.mean.copy_(mean)
        self.net.std.copy_(torch.where(std > 1e-6, std, 1.0))
