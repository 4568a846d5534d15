"""Routers: a score per row of signals; a score above the threshold defers the span to the LLM.

Training-free routers and baselines live here; the trained one is `r2r_glimp.routing.mlp`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from r2r_glimp.core import Decision, Granularity, Model, UsageError
from r2r_glimp.routing.drift import Traffic
from r2r_glimp.routing.signals import Signals, entropy_nats, margin


class Router:
    """Maps signals to scores. Stateless: the same row gives the same score, whatever else is in the
    batch.

    Attributes:
        name: the registered name.
        granularity: the only granularity it is made for, None for both.
        constant: the model that always writes, for the baselines that look at nothing.
        hidden_layer: the SLM's layer whose output it looks at, counted from 1; None for the last
            hidden state, after the final norm.
        traffic: what requests were like when it was calibrated, to notice that they change.
        capturable: `score` is made of tensors alone, on the SLM's device, and reads nothing back:
            it can be part of a CUDA graph.
    """

    name: str
    granularity: Granularity | None = None
    constant: Model | None = None
    hidden_layer: int | None = None
    traffic: Traffic | None = None
    capturable: bool = False

    def threshold(self, granularity: Granularity) -> float:
        """The threshold used where a request names none."""
        return 0.5

    def threshold_for_share(self, share: float) -> float:
        """The threshold that a calibration found to give an LLM share (0 to 1).

        Raises:
            UsageError: the router was not calibrated there.
        """
        raise UsageError(
            f"router {self.name!r} has no calibration for this pair, so no threshold is known for "
            f"an LLM share of {share:g}: give a threshold, or use a calibrated router"
        )

    def score(self, signals: Signals) -> Tensor:
        """Scores, float32 [N]."""
        raise NotImplementedError(f"{type(self).__name__} must implement score()")

    def defers(self, score: float, threshold: float) -> bool:
        """Whether a span with this score goes to the LLM."""
        return score > threshold


class EntropyRouter(Router):
    """Entropy of the SLM's distribution in nats; at step granularity this is H_init (GlimpRouter,
    section 3).

    Args:
        top_k: renormalise over this many tokens first, as the paper's code does (20); None is the
            full vocabulary.
    """

    name = "entropy"
    capturable = True

    def __init__(self, top_k: int | None = None) -> None:
        if top_k is not None and top_k < 2:
            raise UsageError(f"entropy_top_k={top_k!r} is out of range: 2 or more")
        self.top_k = top_k

    def threshold(self, granularity: Granularity) -> float:
        # GlimpRouter's tau, and the entropy threshold R2R ships. Neither transfers between SLMs:
        # calibrate.
        return 1.0 if granularity == "step" else 0.45

    def score(self, signals: Signals) -> Tensor:
        return entropy_nats(signals.logits_NV, self.top_k)


class MarginRouter(Router):
    """1 - (p1 - p2) of the SLM's two likeliest tokens."""

    name = "margin"
    capturable = True

    def score(self, signals: Signals) -> Tensor:
        return margin(signals.logits_NV)


class RandomRouter(Router):
    """Baseline: defers with a fixed probability; the threshold is that probability, the wanted
    share."""

    name = "random"
    capturable = True

    def threshold(self, granularity: Granularity) -> float:
        return 0.1

    def threshold_for_share(self, share: float) -> float:
        return share

    def score(self, signals: Signals) -> Tensor:
        return torch.as_tensor(signals.uniforms, dtype=torch.float64)

    def defers(self, score: float, threshold: float) -> bool:
        return score < threshold


class ConstantRouter(Router):
    """Baselines `slm` and `llm`: one model writes everything, the other computes nothing."""

    def __init__(self, model: Model) -> None:
        self.constant = model
        self.name = model.label

    def threshold_for_share(self, share: float) -> float:
        raise UsageError(f"router {self.name!r} never decides: an LLM share is not its to choose")


class ReplayRouter(Router):
    """Repeats recorded decisions: the generated positions at which a span was deferred.

    Args:
        deferred: those positions, or a trace to take them from.
    """

    name = "replay"

    def __init__(self, deferred: Iterable[int | Decision]) -> None:
        self.deferred = frozenset(
            d.position if isinstance(d, Decision) else d
            for d in deferred
            if not isinstance(d, Decision) or d.deferred
        )

    def score(self, signals: Signals) -> Tensor:
        return torch.tensor([float(p in self.deferred) for p in signals.positions])


NAMED_ROUTERS: dict[str, Callable[[], Router]] = {
    "entropy": EntropyRouter,
    "margin": MarginRouter,
    "random": RandomRouter,
    "slm": lambda: ConstantRouter(Model.SLM),
    "llm": lambda: ConstantRouter(Model.LLM),
}


def named_router(name: str) -> Router:
    """A router that needs nothing but its name.

    Raises:
        UsageError: no such name.
    """
    if name not in NAMED_ROUTERS:
        known = ", ".join(NAMED_ROUTERS)
        raise UsageError(
            f"unknown router {name!r}: choose one of {known}, "
            "or the folder or Hub id of a trained one"
        )
    return NAMED_ROUTERS[name]()
