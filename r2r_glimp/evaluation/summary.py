"""The tables of an evaluation, for programs.

A row is a system: how right it is, how much of the way from the SLM to the LLM that recovers, and
what it costs. Intervals are 95% bootstrap intervals over questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from r2r_glimp.evaluation.comparison import Comparison, compare
from r2r_glimp.evaluation.result import Result
from r2r_glimp.evaluation.statistics import Floats, interval, resample_weights
from r2r_glimp.evaluation.store import Sample
from r2r_glimp.evaluation.system import ORACLE

__all__ = ["Result", "Row", "Summary", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Shares are fractions; tokens, switches, decisions are per answer.

    Attributes:
        gap: the way from the SLM's accuracy to the LLM's that is recovered.
        oracle_ratio: the LLM share over the oracle's at equal accuracy, which the oracle reaches by
            answering as many of the questions, drawn at random, as it takes.
        average_parameters, cost: as R2R counts them; see `cost.py`.
        decisions: rows of the SLM that a router looked at. None is computed for that alone.
        deferrals: of these, spans that went to the LLM; the SLM's proposal was dropped.
        slm_computed, llm_computed: tokens that went through the model.
        slm_prefill, llm_prefill: of these, the prompt, and what the other model wrote.
        undecided: answers that the grader could not tell right from wrong; they count as not right.
        failed: answers with an error; they count as not right.
        seconds: wall time of the system, all its answers together.
    """

    router: str
    granularity: str | None
    target_share: float | None
    threshold: float | None
    answers: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    gap: float | None
    gap_low: float | None
    gap_high: float | None
    llm_share: float
    llm_share_low: float
    llm_share_high: float
    oracle_ratio: float | None = None
    average_parameters: float
    cost: float
    tokens: float
    switches: float
    decisions: float
    deferrals: float
    slm_computed: float
    llm_computed: float
    slm_prefill: float
    llm_prefill: float
    wrong: int
    unanswered: int
    undecided: int
    truncated: int
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """All rows, paired tests, and where the figures come from."""

    task: str
    questions: int
    repeats: int
    rows: list[Row]
    comparisons: list[Comparison]
    about: Mapping[str, Any]
    first_error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def summarise(
    task: str, repeats: int, results: Sequence[Result], about: Mapping[str, Any] | None = None
) -> Summary:
    """The table of some systems' answers to the same questions."""
    questions = list(dict.fromkeys(sample.id for sample in results[0].samples))
    weights = resample_weights(len(questions))
    ends = {r.system.router: r.right(questions) for r in results if r.system.granularity is None}
    rows = [_row(result, questions, weights, ends) for result in results]
    rows = [replace(row, oracle_ratio=_oracle_ratio(row, rows)) for row in rows]
    errors = (sample.error for result in results for sample in result.samples if sample.error)
    return Summary(
        task,
        len(questions),
        repeats,
        rows,
        compare(results, questions, weights),
        about or {},
        next(errors, None),
    )


def _row(result: Result, questions: Sequence[str], weights: Floats, ends: dict[str, Floats]) -> Row:
    samples, system = result.samples, result.system
    right = result.right(questions)
    gap = gap_low = gap_high = None
    if "slm" in ends and "llm" in ends and system.granularity is not None:
        slm, llm = ends["slm"], ends["llm"]
        if llm.mean() > slm.mean():
            gap = float((right.mean() - slm.mean()) / (llm.mean() - slm.mean()))
            width = weights @ (llm - slm)
            ratios = (weights @ (right - slm))[width > 0] / width[width > 0]
            gap_low, gap_high = interval(ratios)
    llm_tokens = result.mean_of(questions, [s.llm_tokens for s in samples])
    tokens = result.mean_of(questions, [s.llm_tokens + s.slm_tokens for s in samples])
    share = float(llm_tokens.sum() / max(1, tokens.sum()))
    share_low, share_high = interval((weights @ llm_tokens) / np.maximum(weights @ tokens, 1e-9))
    low, high = interval(weights @ right)
    average = _average_parameters(result, share)
    return Row(
        router=system.name,
        granularity=system.granularity,
        target_share=system.target_share,
        threshold=system.threshold,
        answers=len(samples),
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        gap=gap,
        gap_low=gap_low,
        gap_high=gap_high,
        llm_share=share,
        llm_share_low=share_low,
        llm_share_high=share_high,
        average_parameters=average,
        cost=average * float(tokens.mean()),
        tokens=float(tokens.mean()),
        switches=_mean(samples, "switches"),
        decisions=_mean(samples, "decisions"),
        deferrals=_mean(samples, "deferrals"),
        slm_computed=_mean(samples, "slm_computed"),
        llm_computed=_mean(samples, "llm_computed"),
        slm_prefill=_mean_of([max(0, s.slm_computed - s.slm_tokens) for s in samples]),
        llm_prefill=_mean_of([max(0, s.llm_computed - s.llm_tokens) for s in samples]),
        wrong=sum(s.grade == "wrong" for s in samples),
        unanswered=sum(s.grade == "unanswered" for s in samples),
        undecided=sum(s.grade == "undecided" for s in samples),
        truncated=sum(s.finish_reason == "length" for s in samples),
        failed=sum(s.error is not None for s in samples),
        seconds=round(result.seconds, 2),
    )


def _oracle_ratio(row: Row, rows: Sequence[Row]) -> float | None:
    oracles = [r for r in rows if r.router == ORACLE and r.granularity == row.granularity]
    if not oracles or row.gap is None or not oracles[0].gap or row.gap <= 0:
        return None
    return row.llm_share / (oracles[0].llm_share * row.gap / oracles[0].gap)


def _average_parameters(result: Result, share: float) -> float:
    """A model that writes alone works alone."""
    parameters = result.parameters
    if result.system.router == "llm":
        return parameters.llm
    return parameters.average(share)


def _mean(samples: Sequence[Sample], name: str) -> float:
    return _mean_of([getattr(sample, name) for sample in samples])


def _mean_of(values: Sequence[float]) -> float:
    return float(np.mean(values))
