"""Free labels: a routed answer's trace tells, at no extra LLM cost, where both models agree.

While it catches up over what the SLM wrote, the LLM computes a row for each position, and its
likeliest token there is recorded (`RoutingParams(trace=True)`). What comes out is identical or
not; whether a difference matters is not known.
"""

from collections.abc import Sequence

from labeling.schema import Label
from r2r_glimp.core import Decision


def llm_choices(trace: Sequence[Decision]) -> list[int | None]:
    """The LLM's choice at each generated position, written or recorded; None where unknown."""
    return [d.token if d.source == "llm" else d.llm_token for d in trace]


def agreement(
    candidates: Sequence[int],
    references: Sequence[int | None],
    mismatch: Label = Label.DIVERGENT,
) -> list[Label]:
    """Identical where the candidate is the LLM's choice, else `mismatch`; unlabeled if unknown."""
    return [
        Label.UNLABELED if llm is None else Label.IDENTICAL if slm == llm else mismatch
        for slm, llm in zip(candidates, references, strict=True)
    ]
