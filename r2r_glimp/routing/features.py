"""What a trained router sees of a row, built in one place for the engine, labeling and training
alike.

    Signals ──observe──▶ Observation ──FeatureSpec.inputs──▶ named float32 tensors ──▶ MLPRouterNet
                             ▲  │
      labeled dataset ───────┘  └──▶ labeled dataset

An observation is what the labeled dataset keeps of a row, so a router is trained on exactly what it
is served: hidden states pass through bfloat16 in either case, whatever dtype the model runs in.

Shape suffixes: N rows, H hidden size, K top logits, V vocabulary.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from r2r_glimp.core import UsageError
from r2r_glimp.routing.signals import Signals, entropy_nats, margin
from r2r_glimp.routing.strict import read_fields

MAX_WIDTH = 2**16


@dataclass(slots=True)
class Observation:
    """Rows of the SLM as a router may see them; None for what it does not look at."""

    hidden_NH: Tensor | None  # bfloat16, after the final norm
    top_logits_NK: Tensor | None  # float32, descending
    candidates_N: Tensor | None  # int64, the token the SLM proposes
    entropy_N: Tensor | None  # float32, nats
    margin_N: Tensor | None  # float32, 1 - (p1 - p2)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """The inputs of a trained router, all read off one row of the SLM.

    Args:
        hidden_size: of the SLM.
        hidden: a hidden state, the last one unless `hidden_layer` names another.
        hidden_layer: of which layer's output, counted from 1; None is the last hidden state, after
            the final norm.
        top_k_logits: how many of the highest logits, values alone, in descending order; 0 for none.
        candidate: the embedding of the token the SLM proposes, from the resident SLM's input
            embedding.
        entropy: of the full distribution, nats.
        margin: 1 - (p1 - p2).

    Raises:
        UsageError: a number is out of range, or no input is left.
    """

    hidden_size: int
    hidden: bool = True
    top_k_logits: int = 32
    candidate: bool = True
    entropy: bool = True
    margin: bool = True
    hidden_layer: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.hidden_size <= MAX_WIDTH:
            raise UsageError(f"hidden_size={self.hidden_size} is out of range: 1 to {MAX_WIDTH}")
        if not 0 <= self.top_k_logits <= MAX_WIDTH:
            raise UsageError(f"top_k_logits={self.top_k_logits} is out of range: 0 to {MAX_WIDTH}")
        if self.hidden_layer is not None and not 1 <= self.hidden_layer <= MAX_WIDTH:
            raise UsageError(f"hidden_layer={self.hidden_layer} is out of range: 1 or more")
        if not self.widths:
            raise UsageError(
                "a router needs at least one of hidden, top_k_logits, candidate, entropy, margin"
            )

    @property
    def widths(self) -> dict[str, int]:
        """Width of each enabled input, in the order in which the network takes them."""
        widths = {
            "hidden": self.hidden * self.hidden_size,
            "top_logits": self.top_k_logits,
            "candidate": self.candidate * self.hidden_size,
            "entropy": int(self.entropy),
            "margin": int(self.margin),
        }
        return {name: width for name, width in widths.items() if width}

    @property
    def dim(self) -> int:
        """Numbers a row has, all inputs together."""
        return sum(self.widths.values())

    def inputs(
        self, observation: Observation, embedding_VH: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The network's inputs, float32 [N, width] each.

        Args:
            observation: with at least the fields that this spec looks at; further top logits are
                cut off.
            embedding_VH: the SLM's input embedding, needed for `candidate`.

        Raises:
            UsageError: a field is missing or has the wrong width.
        """
        raw: dict[str, Tensor | None] = {
            "hidden": observation.hidden_NH,
            "top_logits": _cut(observation.top_logits_NK, self.top_k_logits),
            "candidate": _embed(observation.candidates_N, embedding_VH),
            "entropy": _column(observation.entropy_N),
            "margin": _column(observation.margin_N),
        }
        inputs = {}
        for name, width in self.widths.items():
            value = raw[name]
            if value is None or value.shape[-1] != width:
                found = "is missing" if value is None else f"is {value.shape[-1]} wide"
                raise UsageError(f"router input {name} {found}, the router wants {width}")
            inputs[name] = value.float()
        return inputs

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "features") -> "FeatureSpec":
        """From the JSON form; raises CheckpointError on a key or type that does not belong."""
        return read_fields(cls, data, where)


def observe(signals: Signals, spec: FeatureSpec) -> Observation:
    """What `spec` looks at in rows of the SLM; labeling stores the same.

    Raises:
        UsageError: the vocabulary has fewer tokens than the top logits wanted, or the layer's
            hidden state was not kept.
    """
    logits_NV = signals.logits_NV
    if spec.top_k_logits > logits_NV.shape[-1]:
        raise UsageError(
            f"top_k_logits={spec.top_k_logits}, but the vocabulary has {logits_NV.shape[-1]} tokens"
        )
    hidden_NH = signals.hidden_NH
    if spec.hidden and spec.hidden_layer is not None:
        if spec.hidden_layer not in signals.layers:
            raise UsageError(f"the hidden state of layer {spec.hidden_layer} was not kept")
        hidden_NH = signals.layers[spec.hidden_layer]
    top = logits_NV.float().topk(spec.top_k_logits, -1).values if spec.top_k_logits else None
    return Observation(
        hidden_NH=hidden_NH.bfloat16() if spec.hidden else None,
        top_logits_NK=top,
        candidates_N=signals.candidates_N if spec.candidate else None,
        entropy_N=entropy_nats(logits_NV) if spec.entropy else None,
        margin_N=margin(logits_NV) if spec.margin else None,
    )


def _cut(top_logits_NK: Tensor | None, k: int) -> Tensor | None:
    return None if top_logits_NK is None else top_logits_NK[:, :k]


def _embed(candidates_N: Tensor | None, embedding_VH: Tensor | None) -> Tensor | None:
    if candidates_N is None or embedding_VH is None:
        return None
    return torch.nn.functional.embedding(candidates_N, embedding_VH).bfloat16()


def _column(values_N: Tensor | None) -> Tensor | None:
    return None if values_N is None else values_N[:, None]
