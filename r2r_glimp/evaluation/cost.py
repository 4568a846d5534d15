"""Costs: parameters that work on an average token, as R2R counts them (arXiv 2505.21600).

average = SLM + router + LLM share x LLM          cost = average x generated tokens
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2r_glimp.models.pair import ModelPair
    from r2r_glimp.routing.routers import Router


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters that work on a token."""

    slm: float
    router: float
    llm: float

    def average(self, llm_share: float) -> float:
        """Of a routed text; the SLM and the router read every token."""
        return self.slm + self.router + llm_share * self.llm


def count_parameters(pair: "ModelPair", router: "Router | None") -> Parameters:
    """Of both models and of a router's network, if it has one."""
    net = getattr(router, "net", None)
    own = 0 if net is None else sum(parameter.numel() for parameter in net.parameters())
    return Parameters(active(pair.slm.model), float(own), active(pair.llm.model))


def active(model: Any) -> float:
    """Parameters that work on a token; of experts, those that are chosen."""
    config = model.config.get_text_config()
    total = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / total if total and chosen else 1.0
    return sum(
        parameter.numel() * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
    )
