"""Sampling: logits to tokens, vectorised over rows with different parameters.

The only randomness is one number per (seed, position, stream), made by a counter-based hash. So a
request's text does not depend on its batch mates, survives preemption, and is the same on every
device up to rounding.
"""

from enum import IntEnum

import torch
from torch import Tensor

from r2r_glimp.core import SamplingParams, TokenLogprob

_MASK = 2**64 - 1


class Stream(IntEnum):
    """Independent sources of randomness of one request."""

    SLM = 0
    LLM = 1
    ROUTER = 2


def uniform(seed: int, position: int, stream: Stream) -> float:
    """A number in [0, 1) for a request's seed, generated position and stream (splitmix64)."""
    x = (seed + 0x9E3779B97F4A7C15 * (3 * position + stream + 1)) & _MASK
    for _ in range(2):  # two rounds: neighbouring seeds must not give neighbouring numbers
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / 2**53


def columns(params: list[SamplingParams], uniforms: list[float]) -> list[list[float]]:
    """What `draw` reads of each row: one list per parameter."""
    return [
        [p.temperature for p in params],
        [float(p.top_k) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        uniforms,
    ]


NUM_COLUMNS = 5


def draw(logits_NV: Tensor, columns_CN: Tensor) -> Tensor:
    """One token per row, int64 [N], by inverse transform over the filtered distribution, likeliest
    token first.

    Filters in the order temperature, top-k, top-p, min-p, as transformers applies them. Nothing is
    read back, so it may be captured. A row of temperature 0 gets a token that means nothing.

    Args:
        columns_CN: the rows' `columns`, float64.
    """
    temperature, top_k, top_p, min_p, uniforms = columns_CN.unsqueeze(-1)
    scaled = logits_NV.double() / temperature.masked_fill(temperature == 0, 1)
    probs, ids = torch.sort(scaled.softmax(-1), dim=-1, descending=True, stable=True)
    size = probs.shape[1]
    rank = torch.arange(size, device=probs.device)
    probs = probs * ((rank < top_k) | (top_k == 0))
    probs = probs / probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    # The likeliest token always stays, as in transformers' warpers.
    keep = (before < top_p) & (probs >= min_p * probs[:, :1])
    keep[:, 0] = True
    probs = probs * keep
    total = probs.cumsum(-1)
    threshold = uniforms * total[:, -1:]
    pick = (total <= threshold).sum(-1, keepdim=True).clamp_max(size - 1)
    return ids.gather(1, pick).squeeze(1)


def likeliest(logits_NV: Tensor) -> Tensor:
    """The argmax of each row, int64 [N]; but with vectors on the CPU."""
    return logits_NV.max(-1).indices


def sample(logits_NV: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """One token per row: the likeliest at temperature 0, else drawn."""
    tokens = likeliest(logits_NV)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        device = logits_NV.device
        index = torch.tensor(drawn, device=device)
        of_drawn = columns([params[i] for i in drawn], [uniforms[i] for i in drawn])
        columns_CN = torch.tensor(of_drawn, dtype=torch.float64, device=device)
        tokens[index] = draw(logits_NV[index], columns_CN)
    return tokens.tolist()


def token_logprob(logits_V: Tensor, token: int, num_top: int) -> TokenLogprob:
    """Log-probability of a token at temperature 1, and the `num_top` likeliest tokens with
    theirs."""
    logp = logits_V.float().log_softmax(-1)
    top = logp.topk(num_top) if num_top else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else ()
    return TokenLogprob(token, logp[token].item(), pairs)
