"""Plots of a summary: accuracy against LLM share, and against the parameters that work on an
average token.
"""

from pathlib import Path
from typing import Any

from r2r_glimp.evaluation.summary import Row, Summary

AXES = {
    "share": ("llm_share", "LLM share of the text"),
    "parameters": ("average_parameters", "parameters that work on an average token"),
}


def draw(summary: Summary, folder: Path) -> list[Path]:
    """One PNG per axis and granularity; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    granularities = sorted({str(row.granularity) for row in summary.rows if row.granularity})
    for granularity in granularities:
        for name, (field, label) in AXES.items():
            figure = Figure(figsize=(6, 4), layout="constrained")
            FigureCanvasAgg(figure)
            _draw(figure.add_subplot(), summary, granularity, field, label)
            paths.append(folder / f"{name}-{granularity}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _draw(axes: Any, summary: Summary, granularity: str, field: str, label: str) -> None:
    for row in summary.rows:
        if row.granularity is None:
            style = {"slm": ":", "llm": "--"}.get(row.router, "-")
            axes.axhline(row.accuracy, color="0.4", linestyle=style, linewidth=1, label=row.router)
            axes.axhspan(row.accuracy_low, row.accuracy_high, color="0.9", zorder=0)
    routers = dict.fromkeys(r.router for r in summary.rows if r.granularity == granularity)
    for color, router in enumerate(routers):
        rows: list[Row] = sorted(
            (r for r in summary.rows if (r.router, r.granularity) == (router, granularity)),
            key=lambda row: float(getattr(row, field)),
        )
        x = [getattr(row, field) for row in rows]
        y = [row.accuracy for row in rows]
        axes.plot(x, y, marker="o", markersize=4, color=f"C{color}", label=router)
        low, high = [r.accuracy_low for r in rows], [r.accuracy_high for r in rows]
        if len(rows) > 1:
            axes.fill_between(x, low, high, color=f"C{color}", alpha=0.15)
        else:
            axes.vlines(x, low, high, color=f"C{color}", alpha=0.5)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy")
    axes.set_title(f"{summary.task}, routed per {granularity}")
    axes.legend(fontsize=8)
