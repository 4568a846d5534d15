"""Router checkpoints: a folder of plain files, read strictly.

    config.json           what to build, its thresholds, the fingerprints of the pair
    model.safetensors     float32 weights, exactly the tensors that config.json asks for
    README.md             the model card
    curve.json            share, recall and precision against the threshold (optional)
    traffic.json          what calibration's requests were like, to notice drift (optional)
    training_config.yaml  what the trainer was told (optional)

No pickle and no code: the router's class is looked up by its registered name. Token embeddings are
the resident SLM's and are not stored.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor

from r2r_glimp.core import CheckpointError
from r2r_glimp.hub.card import render_card
from r2r_glimp.hub.config import ROUTERS, RouterConfig
from r2r_glimp.hub.files import read_tensors, read_text, writing_folder
from r2r_glimp.models.files import read_json
from r2r_glimp.models.source import locate
from r2r_glimp.routing.drift import Traffic
from r2r_glimp.routing.mlp import MLPRouter, MLPRouterNet
from r2r_glimp.routing.strict import check_keys

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CURVE, TRAFFIC, TRAINING_CONFIG = "curve.json", "traffic.json", "training_config.yaml"
FILES = [CONFIG, WEIGHTS, CARD, CURVE, TRAFFIC, TRAINING_CONFIG]
CURVE_KEYS = ("threshold", "llm_share", "recall", "precision")


@dataclass
class RouterCheckpoint(ModelHubMixin, library_name="r2r_glimp", tags=["router"]):
    """A trained router as it lies on disk or on the Hub.

    Attributes:
        config: what `config.json` holds.
        tensors: the network's weights, float32.
        curve: columns `threshold`, `llm_share`, `recall`, `precision` of equal length, and
            `measured_on`.
        training_config: what the trainer was told, YAML.
        traffic: what calibration's requests were like.
    """

    config: RouterConfig
    tensors: dict[str, Tensor]
    curve: dict[str, Any] | None = None
    training_config: str | None = None
    traffic: Traffic | None = None

    def build(self) -> MLPRouter:
        """The router, on the CPU, not yet bound to an SLM."""
        with torch.device("meta"):
            net = MLPRouterNet(self.config.model)
        net.load_state_dict(self.tensors, strict=True, assign=True)
        config, curve = self.config, self.curve or {}
        points = zip(curve.get("threshold", ()), curve.get("llm_share", ()), strict=True)
        return ROUTERS[config.router](
            net,
            config.thresholds,
            config.default_threshold,
            config.slm,
            [(t, share) for t, share in points if t is not None and share is not None],
            self.traffic,
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push: Any,
    ) -> str | None:
        """Write the folder, whole or not at all.

        Args:
            save_directory: the folder.
            overwrite: replace a router that is there.
            repo_id, push_to_hub, push: publish it as well, as `push_to_hub` does.

        Raises:
            UsageError: the folder is there.
            CheckpointError: it could not be written.
        """
        folder = Path(save_directory)
        with writing_folder(folder, overwrite, is_ours=CONFIG) as fresh:
            self._save_pretrained(fresh)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, **push)

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save

        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()
        }
        (save_directory / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        texts = {CONFIG: to_json(self.config.to_dict()), CARD: render_card(self.config.to_dict())}
        if self.curve is not None:
            texts[CURVE] = to_json(self.curve)
        if self.traffic is not None:
            texts[TRAFFIC] = to_json(self.traffic.to_dict())
        if self.training_config is not None:
            texts[TRAINING_CONFIG] = self.training_config
        for name, text in texts.items():
            (save_directory / name).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: str | Path, *, revision: str | None = None
    ) -> "RouterCheckpoint":
        """A local folder, else a Hub repository.

        Args:
            name_or_path: a folder, or ORG/NAME.
            revision: branch, tag or commit of a Hub repository.

        Raises:
            CheckpointError: not there, not whole, unsafe, or not what its config.json says.
        """
        return read_checkpoint(locate(name_or_path, revision=revision)[0])

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, written from the run."""
        return ModelCard(render_card(self.config.to_dict()))


def read_checkpoint(folder: Path) -> RouterCheckpoint:
    """The checkpoint in a local folder; raises CheckpointError that names file and fault."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder}: no {CONFIG}: this is not a router checkpoint{_other_format(folder)}"
        )
    config = RouterConfig.from_dict(read_json(folder / CONFIG), str(folder / CONFIG))
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder}: no {WEIGHTS}{_other_format(folder)}")
    with torch.device("meta"):
        wanted = MLPRouterNet(config.model).state_dict()
    tensors = read_tensors(folder / WEIGHTS, wanted)
    if (tensors["std"] <= 0).any():
        raise CheckpointError(f"{folder / WEIGHTS}: std has values that are not positive")
    traffic = folder / TRAFFIC
    has_training_config = (folder / TRAINING_CONFIG).exists()
    return RouterCheckpoint(
        config,
        tensors,
        curve=_read_curve(folder / CURVE) if (folder / CURVE).exists() else None,
        training_config=read_text(folder / TRAINING_CONFIG) if has_training_config else None,
        traffic=Traffic.from_dict(read_json(traffic), str(traffic)) if traffic.exists() else None,
    )


def load_router(name_or_path: str | Path, revision: str | None = None) -> MLPRouter:
    """A trained router from a local folder or the Hub: `RouterCheckpoint.from_pretrained`."""
    return RouterCheckpoint.from_pretrained(name_or_path, revision=revision).build()


def to_json(data: Any) -> str:
    """Readable JSON; raises ValueError on NaN, which JSON has no word for."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _read_curve(path: Path) -> dict[str, Any]:
    curve = read_json(path)
    check_keys(curve, {"measured_on", *CURVE_KEYS}, str(path))
    columns = [curve[key] for key in CURVE_KEYS]
    numbers = all(
        isinstance(column, list) and all(x is None or _is_number(x) for x in column)
        for column in columns
    )
    if not numbers or len({len(column) for column in columns}) != 1:
        raise CheckpointError(f"{path}: its columns are not lists of numbers of one length")
    return curve


def _other_format(folder: Path) -> str:
    """A hint where the folder holds weights of a kind that is not read."""
    pickles = sorted(
        p.name for kind in ("*.pt", "*.pth", "*.bin", "*.pkl", "*.ckpt") for p in folder.glob(kind)
    )
    if not pickles:
        return ""
    return (
        f" (it holds {pickles[0]}: pickles are not loaded; `r2r-glimp import-r2r` converts R2R's)"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
