"""What the SLM says of its own steps, from recorded outputs: H_init and the signals it beat.

GlimpRouter (arXiv 2601.05110) compares the entropy of a step's first token with two signals that
are known only once the SLM has written the step: its mean entropy, and its perplexity. A recorded
run in which the SLM writes all the thinking, scored per token by its entropy, and the LLM the
answer, holds everything: catching up, the LLM tells for free what it would have written at every
position.

    r2r-glimp generate --file Q.jsonl --router entropy --granularity token --threshold 100 \\
        --answer_by llm --trace --logprobs 0 --output trace.jsonl
    r2r-glimp inspect trace.jsonl --signals
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r2r_glimp.core import DataError
from r2r_glimp.routing.steps import delimiter_pattern, ends_step
from r2r_glimp.routing.tags import ThinkTags

Record = Mapping[str, Any]
Floats = NDArray[np.float64]
SIGNALS = ("H_init", "H_step", "PPL_step")
_SHARES = (0.1, 0.2, 0.3)
_HOW = (
    "record it with generate --router entropy --granularity token --threshold 100 --answer_by llm "
    "--trace --logprobs 0"
)


@dataclass(frozen=True, slots=True)
class StepSignals:
    """One step of the SLM's.

    Attributes:
        text: what it says.
        h_init: entropy of the SLM's distribution of its first token, in nats.
        h_step: mean of that over its tokens.
        ppl_step: perplexity of the step under the SLM.
        agreement: share of its tokens that the LLM would have written too.
    """

    text: str
    h_init: float
    h_step: float
    ppl_step: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalSummary:
    """One signal over many steps.

    Attributes:
        quantiles: its 10%, 50% and 90% quantiles.
        bimodality: Sarle's coefficient: above 0.555, the uniform distribution's, hints at two modes
            or a heavy tail.
        correlation: Spearman's, with the LLM's agreement; -1 is what a router would like.
        auroc: telling steps that the LLM would have written otherwise from the rest; None where
            there is only one kind.
        caught: of these steps, those among the 10, 20 and 30% of steps with the highest signal.
    """

    name: str
    quantiles: tuple[float, float, float]
    bimodality: float
    correlation: float
    auroc: float | None
    caught: tuple[float, ...] | None


def read_steps(records: Iterable[Record], delimiter: str = "blank_line") -> list[StepSignals]:
    """The steps of the thinking in all outputs.

    Raises:
        DataError: an output was not recorded so that the signals are in it, or there are no steps.
    """
    steps = [step for record in records for step in _steps_of(record, delimiter)]
    if not steps:
        raise DataError(f"no output has a step that the SLM wrote and the LLM read: {_HOW}")
    return steps


def summarise_signals(steps: Sequence[StepSignals]) -> list[SignalSummary]:
    """Each signal's distribution, and what it knows of the LLM's view."""
    agreement = np.array([step.agreement for step in steps])
    differs = agreement < 1
    columns = {
        "H_init": np.array([step.h_init for step in steps]),
        "H_step": np.array([step.h_step for step in steps]),
        "PPL_step": np.array([step.ppl_step for step in steps]),
    }
    return [_summary(name, columns[name], agreement, differs) for name in SIGNALS]


def _steps_of(record: Record, delimiter: str) -> Iterator[StepSignals]:
    rows, texts = record.get("trace"), record.get("token_texts")
    logprobs: list[Any] = record.get("logprobs") or []
    if not rows or not texts or not _are_logprobs(logprobs, len(texts)):
        raise DataError(f"output {record.get('id', '?')}: no trace with logprobs: {_HOW}")
    pattern, tags = delimiter_pattern(delimiter), ThinkTags()
    text, members = "", []
    for row in sorted(rows, key=lambda row: int(row["position"])):
        if row["phase"] != "thinking" or row["position"] >= len(texts):
            continue
        text += texts[row["position"]]
        if not text.replace(tags.open, "").strip():
            continue  # the tag, or white space after it, is nobody's step
        members.append(row)
        closed = tags.close in text
        if ends_step(text.replace(tags.open, ""), pattern) or closed:
            said = text.replace(tags.open, "").partition(tags.close)[0].strip()
            if said and all(_is_known(member) for member in members):
                yield _step(said, members, logprobs)
            text, members = "", []
        if closed:
            return


def _are_logprobs(value: Any, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(row, dict) and isinstance(row.get("logprob"), float) for row in value)
    )


def _is_known(row: Mapping[str, Any]) -> bool:
    known = row.get("score") is not None and row.get("llm_token") is not None
    return known and row["source"] == "slm"


def _step(text: str, rows: Sequence[Mapping[str, Any]], logprobs: Sequence[Any]) -> StepSignals:
    entropies = [float(row["score"]) for row in rows]
    written = [float(logprobs[row["position"]]["logprob"]) for row in rows]
    return StepSignals(
        text=text,
        h_init=entropies[0],
        h_step=float(np.mean(entropies)),
        ppl_step=math.exp(-float(np.mean(written))),
        agreement=float(np.mean([row["llm_token"] == row["token"] for row in rows])),
    )


def _summary(
    name: str, values: Floats, agreement: Floats, differs: NDArray[np.bool_]
) -> SignalSummary:
    auroc = caught = None
    if differs.any() and not differs.all():
        ranks = _ranks(values)
        num_differs, num_same = int(differs.sum()), int((~differs).sum())
        above = ranks[differs].sum() - num_differs * (num_differs + 1) / 2
        auroc = float(above / (num_differs * num_same))
        order = np.argsort(-values, kind="stable")
        found = [differs[order[: round(share * len(values))]].sum() for share in _SHARES]
        caught = tuple(float(n / num_differs) for n in found)
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return SignalSummary(
        name=name,
        quantiles=(float(low), float(middle), float(high)),
        bimodality=_bimodality(values),
        correlation=_correlation(_ranks(values), _ranks(agreement)),
        auroc=auroc,
        caught=caught,
    )


def _ranks(values: Floats) -> Floats:
    """From 1, equal values sharing their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[group]
    return ranks


def _correlation(a: Floats, b: Floats) -> float:
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _bimodality(values: Floats) -> float:
    spread = values.std()
    if spread == 0:
        return 0.0
    z = (values - values.mean()) / spread
    return float(((z**3).mean() ** 2 + 1) / (z**4).mean())


def to_text(steps: Sequence[StepSignals], summaries: Sequence[SignalSummary]) -> str:
    """A table for people."""
    differs = sum(step.agreement < 1 for step in steps)
    lines = [
        f"{len(steps):,} steps of the SLM's; the LLM would have written {differs:,} of them "
        f"otherwise ({differs / len(steps):.1%})",
        "",
        "| signal | 10%, 50%, 90% | bimodality | correlation with agreement | AUROC "
        "| caught by 10, 20, 30% of the steps |",
        "|---|---|---|---|---|---|",
    ]
    for s in summaries:
        caught = "" if s.caught is None else ", ".join(f"{share:.0%}" for share in s.caught)
        lines.append(
            f"| {s.name} | {', '.join(f'{q:.3g}' for q in s.quantiles)} | {s.bimodality:.2f} "
            f"| {s.correlation:+.2f} | {'' if s.auroc is None else f'{s.auroc:.2f}'} | {caught} |"
        )
    return "\n".join(lines)
