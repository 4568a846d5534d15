"""The tables of an evaluation, for programs and for people.

A row is a system: how right it is, how much of the way from the SLM to the LLM that recovers, and
what it costs. Intervals are 95% bootstrap intervals over questions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from r2r_glimp.evaluation.cost import Parameters
from r2r_glimp.evaluation.statistics import Floats, interval, resample_weights, sign_flip_test
from r2r_glimp.evaluation.store import Sample
from r2r_glimp.evaluation.system import ORACLE, System
from r2r_glimp.routing.calibration import format_count

FREE = ("random", "entropy", "margin")  # routers that nothing was trained for


@dataclass(frozen=True, slots=True)
class Result:
    """A system's samples, and the parameters it works with."""

    system: System
    samples: Sequence[Sample]
    parameters: Parameters
    seconds: float = 0.0  # to answer what was not there yet

    def right(self, questions: Sequence[str]) -> Floats:
        """Share of right answers to each question, [Q]."""
        return self._mean(questions, [s.grade == "right" for s in self.samples])

    def _mean(self, questions: Sequence[str], values: Sequence[float]) -> Floats:
        places = {id: place for place, id in enumerate(questions)}
        sums, counts = np.zeros(len(questions)), np.zeros(len(questions))
        for sample, value in zip(self.samples, values, strict=True):
            sums[places[sample.id]] += value
            counts[places[sample.id]] += 1
        return sums / counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Shares are fractions; tokens, switches are per answer.

    `oracle_ratio` is the LLM share over the oracle's at equal accuracy, which the oracle reaches by
    answering as many of the questions, drawn at random, as it takes.
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
    slm_computed: float
    llm_computed: float
    wrong: int
    unanswered: int
    truncated: int
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A trained router and a training-free one at the same granularity and wanted share."""

    granularity: str
    target_share: float
    router: str
    against: str
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class Summary:
    """All rows, and paired tests between systems at equal shares."""

    task: str
    questions: int
    repeats: int
    rows: list[Row]
    comparisons: list[Comparison]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def summarise(task: str, repeats: int, results: Sequence[Result]) -> Summary:
    """The table of some systems' answers to the same questions."""
    questions = list(dict.fromkeys(sample.id for sample in results[0].samples))
    weights = resample_weights(len(questions))
    ends = {r.system.router: r.right(questions) for r in results if r.system.granularity is None}
    rows = [_row(result, questions, weights, ends) for result in results]
    rows = [replace(row, oracle_ratio=_oracle_ratio(row, rows)) for row in rows]
    return Summary(task, len(questions), repeats, rows, _compare(results, questions, weights))


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
    llm_tokens = result._mean(questions, [s.llm_tokens for s in samples])
    tokens = result._mean(questions, [s.llm_tokens + s.slm_tokens for s in samples])
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
        switches=_mean_of(samples, "switches"),
        decisions=_mean_of(samples, "decisions"),
        slm_computed=_mean_of(samples, "slm_computed"),
        llm_computed=_mean_of(samples, "llm_computed"),
        wrong=sum(s.grade == "wrong" for s in samples),
        unanswered=sum(s.grade == "unanswered" for s in samples),
        truncated=sum(s.finish_reason == "length" for s in samples),
        failed=sum(s.finish_reason == "error" for s in samples),
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


def _mean_of(samples: Sequence[Sample], name: str) -> float:
    return float(np.mean([getattr(sample, name) for sample in samples]))


def _compare(
    results: Sequence[Result], questions: Sequence[str], weights: Floats
) -> list[Comparison]:
    """Every trained router against every training-free one, where both were asked for one share."""
    found = []
    for one, other in combinations(results, 2):
        a, b = one.system, other.system
        if a.target_share is None or (a.granularity, a.target_share) != (
            b.granularity,
            b.target_share,
        ):
            continue
        if (a.router in FREE) == (b.router in FREE) or ORACLE in (a.router, b.router):
            continue
        trained, free = (other, one) if a.router in FREE else (one, other)
        differences = trained.right(questions) - free.right(questions)
        low, high = interval(weights @ differences)
        found.append(
            Comparison(
                granularity=str(a.granularity),
                target_share=a.target_share,
                router=trained.system.name,
                against=free.system.name,
                difference=float(differences.mean()),
                low=low,
                high=high,
                p=sign_flip_test(differences),
            )
        )
    return found


def to_markdown(summary: Summary) -> str:
    """Both tables, as Markdown."""
    lines = [
        "| router | per | threshold | accuracy (95%) | gap recovered (95%) | LLM share (95%) "
        "| / oracle's | parameters | switches | unanswered | truncated |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary.rows:
        threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
        gap = ""
        if row.gap is not None and row.gap_low is not None and row.gap_high is not None:
            gap = f"{row.gap:.1%} ({row.gap_low:.1%} to {row.gap_high:.1%})"
        lines.append(
            f"| {row.router} | {row.granularity or ''} | {threshold} "
            f"| {row.accuracy:.1%} ({row.accuracy_low:.1%} to {row.accuracy_high:.1%}) | {gap} "
            f"| {row.llm_share:.1%} ({row.llm_share_low:.1%} to {row.llm_share_high:.1%}) "
            f"| {'' if row.oracle_ratio is None else f'{row.oracle_ratio:.2f}'} "
            f"| {format_count(row.average_parameters)} | {row.switches:.1f} "
            f"| {row.unanswered} | {row.truncated} |"
        )
    if summary.comparisons:
        lines += [
            "",
            "| at a share of | per | router | against | difference in accuracy (95%) | p |",
            "|---|---|---|---|---|---|",
        ]
    for c in summary.comparisons:
        lines.append(
            f"| {c.target_share:.0%} | {c.granularity} | {c.router} | {c.against} "
            f"| {100 * c.difference:+.1f} points ({100 * c.low:+.1f} to {100 * c.high:+.1f}) "
            f"| {c.p:.4f} |"
        )
    about = f"{summary.task}: {summary.questions:,} questions"
    if summary.repeats > 1:
        about += f", {summary.repeats} answers each"
    return "\n".join([about, "", *lines]) + "\n"
