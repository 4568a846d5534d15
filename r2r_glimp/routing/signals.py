"""What a router may look at: one row of the SLM per sequence that stands at a decision point.

Shape suffixes: N rows, H hidden size of the SLM, V its (padded) vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Signals:
    """Rows of the SLM at decision points.

    Attributes:
        hidden_NH: last hidden state, after the final norm, in the model's dtype.
        logits_NV: next-token logits as the model gave them (no temperature).
        candidates_N: the token the SLM proposes (sampled, or the argmax), int64.
        positions: position of that token among the generated tokens of its sequence.
        uniforms: one number in [0, 1) per row, a function of the request's seed and the position;
            a tensor inside a CUDA graph.
        layers: hidden states that routers asked for by `hidden_layer`, [N, H] each.
    """

    hidden_NH: Tensor
    logits_NV: Tensor
    candidates_N: Tensor
    positions: list[int]
    uniforms: list[float] | Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, indices: list[int]) -> "Signals":
        """The given rows alone."""
        index = torch.tensor(indices, device=self.logits_NV.device)
        return Signals(
            self.hidden_NH[index],
            self.logits_NV[index],
            self.candidates_N[index],
            [self.positions[i] for i in indices],
            [float(self.uniforms[i]) for i in indices],
            {layer: hidden_NH[index] for layer, hidden_NH in self.layers.items()},
        )


def entropy_nats(logits_NV: Tensor, top_k: int | None = None) -> Tensor:
    """Entropy of softmax(logits) in nats, float32 [N]; over the `top_k` likeliest tokens,
    renormalised, where given.

    At a step's first token this is H_init (GlimpRouter, arXiv 2601.05110, section 3); `top_k=20` is
    what the paper's code computes, at most ln 20.
    """
    logits = logits_NV.float()
    if top_k is not None:
        logits = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values
    logp = logits.log_softmax(-1)
    # A masked-out token has logit -inf and probability 0; it adds nothing.
    return -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)


def margin(logits_NV: Tensor) -> Tensor:
    """1 - (p1 - p2): how close the two likeliest tokens are, float32 [N] in [0, 1]."""
    top = logits_NV.float().softmax(-1).topk(2, dim=-1).values
    return 1 - (top[:, 0] - top[:, 1])
