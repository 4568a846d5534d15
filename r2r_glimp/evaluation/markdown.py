"""The tables of an evaluation, for people."""

from r2r_glimp.evaluation.comparison import Comparison
from r2r_glimp.evaluation.summary import Row, Summary
from r2r_glimp.routing.calibration import format_count


def to_markdown(summary: Summary) -> str:
    """Accuracy, costs, and paired tests, as Markdown."""
    about = f"{summary.task}: {summary.questions:,} questions"
    if summary.repeats > 1:
        about += f", {summary.repeats} answers each"
    parts = [about, _table(_ACCURACY, [_accuracy(row) for row in summary.rows])]
    parts += _remarks(summary)
    parts.append(_table(_COSTS, [_costs(row) for row in summary.rows]))
    if summary.comparisons:
        parts.append(_table(_TESTS, [_test(c) for c in summary.comparisons]))
    return "\n\n".join(parts) + "\n"


_ACCURACY = (
    "router", "per", "threshold", "accuracy (95%)", "gap recovered (95%)", "LLM share (95%)",
    "/ oracle's", "parameters", "switches", "unanswered", "truncated",
)  # fmt: skip
_COSTS = (
    "router", "per", "threshold", "parameters x tokens", "tokens", "decisions", "to the LLM",
    "SLM prefill", "LLM prefill", "seconds",
)  # fmt: skip
_TESTS = ("at", "per", "router", "against", "difference in accuracy (95%)", "p")


def _accuracy(row: Row) -> list[str]:
    gap = ""
    if row.gap is not None and row.gap_low is not None and row.gap_high is not None:
        gap = f"{row.gap:.1%} ({row.gap_low:.1%} to {row.gap_high:.1%})"
    return [
        *_system(row),
        f"{row.accuracy:.1%} ({row.accuracy_low:.1%} to {row.accuracy_high:.1%})",
        gap,
        f"{row.llm_share:.1%} ({row.llm_share_low:.1%} to {row.llm_share_high:.1%})",
        "" if row.oracle_ratio is None else f"{row.oracle_ratio:.2f}",
        format_count(row.average_parameters),
        f"{row.switches:.1f}",
        str(row.unanswered),
        str(row.truncated),
    ]


def _costs(row: Row) -> list[str]:
    counts = (row.tokens, row.decisions, row.deferrals, row.slm_prefill, row.llm_prefill)
    return [
        *_system(row),
        format_count(row.cost),
        *(f"{count:,.1f}" for count in counts),
        f"{row.seconds:,.1f}",
    ]


def _test(c: Comparison) -> list[str]:
    at = f"threshold {c.threshold:.4g}" if c.target_share is None else f"{c.target_share:.0%}"
    return [
        at,
        c.granularity,
        c.router,
        c.against,
        f"{100 * c.difference:+.1f} points ({100 * c.low:+.1f} to {100 * c.high:+.1f})",
        f"{c.p:.4f}",
    ]


def _system(row: Row) -> list[str]:
    threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
    return [row.router, row.granularity or "", threshold]


def _remarks(summary: Summary) -> list[str]:
    """What must not be overlooked."""
    undecided = sum(row.undecided for row in summary.rows)
    failed = sum(row.failed for row in summary.rows)
    remarks = []
    if undecided:
        remarks.append(f"{undecided} answers could not be graded; they count as not right.")
    if failed:
        remarks.append(f"{failed} answers failed ({summary.first_error}); they count as not right.")
    return remarks


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
