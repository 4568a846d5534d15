"""The report of a calibration: a folder of CSV files, and of plots where matplotlib is there.

calibration.json      everything, as --json prints it
share.csv             LLM share against the threshold, with intervals
scores.csv            histogram of the scores (H_init, at step granularity under entropy)
precision_recall.csv  where labels were given
*.png                 each of them drawn
"""

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from r2r_glimp.cli.calibration.results import Outcome
from r2r_glimp.core import UsageError
from r2r_glimp.routing.mixture import to_scale

TABLES = ("share", "scores", "precision_recall")
_BINS = 60
_POINTS = 400


def write_report(outcome: Outcome, folder: Path) -> None:
    """Write the folder; says in the outcome's notes what could not be drawn.

    Raises:
        UsageError: the folder cannot be written.
    """
    tables = {"share": share_table(outcome), "scores": score_table(outcome)}
    if outcome.labels is not None:
        tables["precision_recall"] = precision_recall_table(outcome)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / f"{name}.{kind}" for name in TABLES for kind in ("csv", "png")):
            old.unlink(missing_ok=True)
        for name, (header, rows) in tables.items():
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *rows])
        text = json.dumps(outcome.to_dict(), indent=2, allow_nan=False) + "\n"
        (folder / "calibration.json").write_text(text, encoding="utf-8")
        if find_spec("matplotlib") is None:
            outcome.notes.append("no plots: matplotlib is not installed (r2r_glimp[train])")
        else:
            _draw(outcome, folder)
    except OSError as error:
        raise UsageError(f"--report {folder}: {error.strerror or error}") from None


Table = tuple[list[str], list[list[Any]]]


def share_table(outcome: Outcome) -> Table:
    """LLM share at every threshold that was measured."""
    rows = []
    for point in outcome.curve.points:
        low, high = point.interval
        rows.append([point.threshold, point.share, low, high, point.num_requests])
    return ["threshold", "llm_share", "llm_share_low", "llm_share_high", "num_prompts"], rows


def score_table(outcome: Outcome) -> Table:
    """Counts of the scores while routing under the first threshold found."""
    scores = outcome.found[0].point.scores
    counts, edges = np.histogram(scores, bins=_BINS)
    rows = list(map(list, zip(edges[:-1], edges[1:], counts, strict=True)))
    return ["from", "to", "decisions"], rows


def precision_recall_table(outcome: Outcome) -> Table:
    """Recall and precision on the labeled text."""
    labels = outcome.labels
    assert labels is not None
    rows = [[t, *labels.quality_at(t)] for t in labels.curve_thresholds()]
    return ["threshold", "recall", "precision"], rows


def _draw(outcome: Outcome, folder: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots = {"share": _draw_share, "scores": _draw_scores}
    if outcome.labels is not None:
        plots["precision_recall"] = _draw_precision_recall
    for name, draw in plots.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(outcome, figure.add_subplot())
        figure.savefig(folder / f"{name}.png", dpi=120)


def _score_name(outcome: Outcome) -> str:
    route = outcome.route
    if route.router.name == "entropy":
        return "H_init (nats)" if route.granularity == "step" else "entropy (nats)"
    return f"{route.router.name} score"


def _draw_share(outcome: Outcome, axes: Any) -> None:
    _, rows = share_table(outcome)
    threshold, share, low, high, _ = np.array(rows).T
    axes.fill_between(threshold, low, high, alpha=0.2, label="95%")
    axes.plot(threshold, share, marker="o", markersize=3)
    for found in outcome.found:
        point = found.point
        axes.plot([point.threshold], [point.share], "k*", markersize=10)
        axes.annotate(f"{point.share:.1%}", (point.threshold, point.share), (5, 5),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    inner = threshold[(share < share.max()) & (share > share.min())]
    if len(inner):  # the ends lie far outside of where anything happens
        axes.set_xlim(-0.02 * inner.max(), 1.1 * inner.max())
    axes.set_xlabel(f"threshold on {_score_name(outcome)}")
    axes.set_ylabel("LLM share of the routed text")
    axes.set_ylim(0, 1.02)
    axes.legend()


def _draw_scores(outcome: Outcome, axes: Any) -> None:
    """The scores, on the scale that a mixture was fitted on."""
    mixture, scale = outcome.mixture or (None, "linear")
    values = to_scale(outcome.found[0].point.scores, scale)
    counts, edges, _ = axes.hist(values, bins=_BINS, color="0.7")
    for i, found in enumerate(outcome.found):
        border = to_scale(np.array([found.point.threshold]), scale)[0]
        axes.axvline(border, color=f"C{i}", linewidth=1, label=found.name)
    if mixture is None:
        axes.set_yscale("log")
    else:
        at = np.linspace(edges[0], edges[-1], _POINTS)
        per_bin = len(values) * (edges[1] - edges[0])
        for name, density in zip(("sure", "unsure"), mixture.density(at), strict=True):
            axes.plot(at, density * per_bin, label=f"mixture: {name}")
        axes.set_ylim(0, 1.3 * counts.max())
    axes.set_xlabel(("" if scale == "linear" else f"{scale} of ") + _score_name(outcome))
    axes.set_ylabel("decisions")
    axes.legend(fontsize=8)


def _draw_precision_recall(outcome: Outcome, axes: Any) -> None:
    _, rows = precision_recall_table(outcome)
    _, recall, precision = np.array(rows).T
    axes.plot(recall, precision)
    for found in outcome.found:
        axes.plot([found.recall], [found.precision], "k*", markersize=10)
        axes.annotate(found.name, (found.recall, found.precision), (5, 5),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
