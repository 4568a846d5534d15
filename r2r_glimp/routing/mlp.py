"""The trained router: a residual MLP over one row of the SLM (R2R, arXiv 2505.21600, section 4.2).

    hidden ──┐ standardise, project ┐
    top_logits ─────────────────────┤
    candidate ──────────────────────┼─ concat ─ linear ─ block × n ─ norm ─ linear ─▶ logit, [N]
    entropy, margin ────────────────┘

    block: x + Linear(Dropout(GELU(Linear(LayerNorm(x)))))

One class for tokens and steps; `width=64, blocks=2` is what abacus needs, `width=1024, blocks=6` is
R2R's size.
Shape suffixes: N rows, W width, H hidden size, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from r2r_glimp.core import CheckpointError, Granularity, UsageError
from r2r_glimp.routing.drift import Traffic
from r2r_glimp.routing.features import MAX_WIDTH, FeatureSpec, observe
from r2r_glimp.routing.routers import Router
from r2r_glimp.routing.signals import Signals
from r2r_glimp.routing.strict import check_keys, read_fields

if TYPE_CHECKING:
    from r2r_glimp.models.fingerprint import Fingerprint
    from r2r_glimp.models.pair import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSize:
    """How large the network is.

    Raises:
        UsageError: a number is out of range.
    """

    width: int = 64
    blocks: int = 2
    expansion: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        ranges = {
            "width": (1, MAX_WIDTH),
            "blocks": (0, 256),
            "expansion": (1, 64),
            "dropout": (0, 0.9),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name}={getattr(self, name)} is out of range: {low} to {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPConfig:
    """All that decides the network's shape and what it is for."""

    granularity: Granularity
    features: FeatureSpec
    size: MLPSize = MLPSize()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: granularity, features, and the size under `network`."""
        return {
            "granularity": self.granularity,
            "features": self.features.to_dict(),
            "network": asdict(self.size),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "config") -> "MLPConfig":
        """From the JSON form.

        Raises:
            CheckpointError: a key too many or too few, or a value of the wrong type or out of
                range.
        """
        check_keys(data, {"granularity", "features", "network"}, where)
        if data["granularity"] not in ("token", "step"):
            raise CheckpointError(
                f"{where}: granularity={data['granularity']!r} is not token or step"
            )
        try:
            features = FeatureSpec.from_dict(data["features"], f"{where}: features")
            size = read_fields(MLPSize, data["network"], f"{where}: network")
        except UsageError as error:
            raise CheckpointError(f"{where}: {error}") from None
        return cls(granularity=data["granularity"], features=features, size=size)


class MLPBlock(nn.Module):
    """x + Linear(Dropout(GELU(Linear(LayerNorm(x))))), [N, W] to [N, W]."""

    def __init__(self, size: MLPSize) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, size.expansion * size.width)
        self.down = nn.Linear(size.expansion * size.width, size.width)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x_NW: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x_NW)))
        return x_NW + self.down(self.dropout(hidden))


class MLPRouterNet(nn.Module):
    """Named inputs to one logit per row; float32 throughout.

    The buffers `mean` and `std` [dim] standardise the inputs, concatenated in the order of
    `FeatureSpec.widths`. They are fitted on the training split, so that no input's scale matters.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        widths, width = config.features.widths, config.size.width
        self.register_buffer("mean", torch.zeros(config.features.dim))
        self.register_buffer("std", torch.ones(config.features.dim))
        self.project = nn.ModuleDict({name: nn.Linear(w, width) for name, w in widths.items()})
        self.merge = nn.Linear(len(widths) * width, width)
        self.blocks = nn.ModuleList(MLPBlock(config.size) for _ in range(config.size.blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits, float32 [N].

        Args:
            inputs: what `FeatureSpec.inputs` gives, [N, width] each.
        """
        projected, start = [], 0
        for name, width in self.config.features.widths.items():
            part = slice(start, start + width)
            standard = (inputs[name] - self.mean[part]) / self.std[part]
            projected.append(self.project[name](standard))
            start += width
        x_NW = self.merge(torch.cat(projected, -1))
        for block in self.blocks:
            x_NW = block(x_NW)
        return self.head(self.norm(x_NW)).squeeze(-1).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A calibrated threshold, with what it was calibrated on and what was achieved there.

    `llm_share`, `recall` and `precision` are fractions, None where they were not measured;
    `llm_share_low` and `llm_share_high` bound the share's 95% interval.
    """

    value: float
    calibrated_on: str
    llm_share: float | None = None
    llm_share_low: float | None = None
    llm_share_high: float | None = None
    recall: float | None = None
    precision: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class MLPRouter(Router):
    """A trained network as a router: sigmoid of its logit, against a calibrated threshold.

    Args:
        net: the network, weights loaded.
        thresholds: calibrated thresholds by name.
        default_threshold: which of them holds where a request names none.
        slm: the SLM it was trained on; None for a router made before that was recorded.
        share_curve: measured points, as (threshold, LLM share).
        traffic: what calibration's requests were like; None where that was not recorded.
    """

    name = "mlp"
    capturable = True

    def __init__(
        self,
        net: MLPRouterNet,
        thresholds: Mapping[str, Threshold],
        default_threshold: str,
        slm: "Fingerprint | None" = None,
        share_curve: Iterable[tuple[float, float]] = (),
        traffic: Traffic | None = None,
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.config = net.config
        self.granularity = net.config.granularity
        features = net.config.features
        self.hidden_layer = features.hidden_layer if features.hidden else None
        self.thresholds = dict(thresholds)
        self.default_threshold = default_threshold
        self.slm = slm
        self.share_curve = sorted(share_curve)
        self.traffic = traffic
        self._embedding_VH: Tensor | None = None

    def threshold(self, granularity: Granularity) -> float:
        """The default threshold's value; raises UsageError at the other granularity."""
        if granularity != self.granularity:
            raise UsageError(
                f"this router was trained for granularity {self.granularity}, not {granularity}"
            )
        return self.thresholds[self.default_threshold].value

    def threshold_for_share(self, share: float) -> float:
        """Between two measured points the threshold is taken to fall with the share.

        Raises:
            UsageError: no point was measured, or the share lies beyond them.
        """
        if not self.share_curve:
            return super().threshold_for_share(share)
        for (low, more), (high, less) in pairwise(self.share_curve):
            if less <= share <= more:
                fraction = (more - share) / (more - less) if more > less else 0.0
                return low + fraction * (high - low)
        shares = [measured for _, measured in self.share_curve]
        raise UsageError(
            f"an LLM share of {share:g} is beyond what this router was calibrated for: "
            f"{min(shares):g} to {max(shares):g}"
        )

    def bind(self, slm: "LoadedModel") -> None:
        """Take the resident SLM's input embedding, and move to its device.

        Raises:
            CheckpointError: the router was trained on another SLM.
        """
        mismatch = self.slm.mismatch(slm.fingerprint) if self.slm is not None else None
        if mismatch is not None:
            raise CheckpointError(f"this router was trained on another SLM: {mismatch}")
        embedding = slm.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        embedding_VH = embedding.weight.detach()
        features = self.config.features
        if features.candidate and embedding_VH.shape[1] != features.hidden_size:
            raise CheckpointError(
                f"this router was trained on an SLM with embeddings {features.hidden_size} wide, "
                f"this one has {embedding_VH.shape[1]}"
            )
        self.net.to(embedding_VH.device)
        self._embedding_VH = embedding_VH

    @torch.inference_mode()
    def score(self, signals: Signals) -> Tensor:
        """Probability that the SLM's choice changes the path, float32 [N].

        Raises:
            UsageError: no SLM is bound, or its rows do not fit.
        """
        features = self.config.features
        if features.candidate and self._embedding_VH is None:
            raise UsageError("this router looks at token embeddings: bind() it to the SLM first")
        inputs = features.inputs(observe(signals, features), self._embedding_VH)
        return self.net(inputs).sigmoid()
