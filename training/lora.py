"""The trainer's view of an alignment: LoRA factors on a frozen SLM, next-token loss on what the LLM
wrote. Checkpoints hold the factors alone.

Shape suffixes: B responses, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from r2r_glimp.core import DataError, UsageError
from r2r_glimp.models.pair import LoadedModel
from training.response_data import TextBatch


class AlignModule(L.LightningModule):
    """Trains LoRA factors (arXiv 2106.09685) on the linear layers of attention and MLP.

    Embeddings stay as they are: a merged adapter could not change tied ones, and a router looks
    tokens up in them.

    Args:
        rank: of the factors.
        alpha: the change is scaled by alpha / rank.
        dropout: before the factors.
        targets: names of the linear layers that get factors; None is all but the output embedding.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: `cosine` to zero over the run, or `constant`, both after the warm-up.
        warmup: share of the steps over which the learning rate rises.
        seed: of the factors and of dropout.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: list[str] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, value, low, high in (
            ("rank", rank, 1, 4096),
            ("alpha", alpha, 1e-6, 1e6),
            ("dropout", dropout, 0, 0.9),
            ("lr", lr, 0, 10),
            ("weight_decay", weight_decay, 0, 10),
            ("warmup", warmup, 0, 1),
        ):
            if not low <= value <= high:
                raise UsageError(f"model.{name}={value} is out of range: {low} to {high}")
        self.strict_loading = False  # of the frozen weights no checkpoint knows
        self.slm: PeftModel | None = None

    def prepare(self, slm: LoadedModel) -> None:
        """Add the factors to a loaded SLM.

        Raises:
            UsageError: a target is no linear layer of it, or an embedding.
        """
        hp: Any = self.hparams
        targets = find_targets(slm.model, hp.targets)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=hp.rank,
            lora_alpha=hp.alpha,
            lora_dropout=hp.dropout,
            target_modules=targets,
            base_model_name_or_path=slm.name,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hp.seed)
            model: Any = slm.model
            wrapped = get_peft_model(model, config)
        assert isinstance(wrapped, PeftModel)
        wrapped.peft_config["default"].base_model_name_or_path = slm.name
        self.slm = wrapped

    def forward(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Mean loss in nats per written token, and the share of them that would be the SLM's own
        greedy choice."""
        assert self.slm is not None
        # Padding stands behind, where causal attention does not look.
        logits_BTV = self.slm(input_ids=batch.ids_BT[:, :-1], use_cache=False).logits
        wanted = batch.written_BT[:, 1:]
        logits, targets = logits_BTV[wanted].float(), batch.ids_BT[:, 1:][wanted]
        agreement = (logits.argmax(-1) == targets).float().mean()
        return cross_entropy(logits, targets), agreement

    def on_train_batch_start(self, batch: TextBatch, batch_idx: int) -> None:
        # A function of (seed, step, process): a resumed run drops what it would have dropped.
        torch.manual_seed(
            (self.hparams["seed"] * 1_000_003 + self.global_step) * 4096 + self.global_rank
        )

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        loss, _ = self(batch)
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss is {loss.item()} at step {self.global_step}: "
                f"lower model.lr={self.hparams['lr']}"
            )
        self.log("train/loss", loss, batch_size=len(batch.ids_BT))
        return loss

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        loss, agreement = self(batch)
        size = int(batch.written_BT.sum())
        self.log("selection/loss", loss, batch_size=size, on_epoch=True, sync_dist=True)
        self.log("selection/agreement", agreement, batch_size=size, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
        hp: Any = self.hparams
        factors = [p for p in self.parameters() if p.requires_grad]
        optimizer = AdamW(factors, lr=hp.lr, weight_decay=hp.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        warmup = max(1, round(hp.warmup * steps)) if math.isfinite(steps) else 1

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if hp.schedule == "constant":
                return 1.0
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return 0.5 * (1 + math.cos(math.pi * done))

        schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def state_dict(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The factors alone."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """The inverse: exactly the factors; raises RuntimeError on any other."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        if odd := sorted(trained ^ state_dict.keys()):
            raise RuntimeError(f"its factors are not this model's: {odd[0]}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)


@torch.no_grad()
def measure(module: AlignModule, batches: Iterable[TextBatch]) -> dict[str, float]:
    """Mean loss (nats) and agreement over all written tokens of some batches."""
    module.eval()
    loss = agreement = tokens = 0.0
    for batch in batches:
        moved = module.transfer_batch_to_device(batch, module.device, 0)
        size = float(batch.written_BT.sum())
        batch_loss, batch_agreement = module(moved)
        loss, agreement = loss + size * float(batch_loss), agreement + size * float(batch_agreement)
        tokens += size
    return {"loss": loss / tokens, "agreement": agreement / tokens}


def find_targets(model: nn.Module, wanted: list[str] | None) -> list[str]:
    """Names of the linear layers that get factors.

    Raises:
        UsageError: one is an embedding, or there is no such layer.
    """
    embeddings = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not output
    } - embeddings
    for name in wanted or ():
        if name in embeddings:
            raise UsageError(f"model.targets has {name}: an adapter of embeddings is not merged")
        if name not in linear:
            raise UsageError(
                f"model.targets has {name}, of which this SLM has none: it has "
                f"{', '.join(sorted(linear))}"
            )
    return sorted(wanted or linear)
