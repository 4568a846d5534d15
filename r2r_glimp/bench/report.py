"""What a bench found: lines of a table for people, plain values for machines, a plot."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r2r_glimp.bench.measure import Sample
from r2r_glimp.core import UsageError


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was measured.

    Attributes:
        name: what ran.
        sample: its repeats, in `unit`.
        unit: s, or a share of 1 (empty).
        tokens: written or read per measurement, for tokens/s.
        bytes_read: by each measurement at least, for bytes/s.
        ratios: how it compares, by the name of what it is compared with.
        parts: where the time goes, shares of 1.
    """

    name: str
    sample: Sample
    unit: str = "s"
    tokens: float | None = None
    bytes_read: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self, bandwidth: float) -> dict[str, Any]:
        """Plain values."""
        median = self.sample.median
        row: dict[str, Any] = {
            "name": self.name,
            "median": median,
            "spread": self.sample.spread,
            "repeats": len(self.sample.values),
            "unit": self.unit,
        }
        if self.tokens:
            row["tokens_per_s"] = self.tokens / median
        if self.bytes_read:
            row["bytes_per_s"] = self.bytes_read / median
            row["of_bandwidth"] = self.bytes_read / median / bandwidth
        return row | {"ratios": dict(self.ratios), "parts": dict(self.parts)}


@dataclass(frozen=True, slots=True)
class Report:
    """A bench's lines, and on what it ran."""

    bench: str
    what: str
    machine: Mapping[str, Any]
    paths: Mapping[str, str]
    lines: list[Line]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one JSON object."""
        bandwidth = self.machine["read_bandwidth"]
        return {
            "bench": self.bench,
            "what": self.what,
            "machine": dict(self.machine),
            "paths": dict(self.paths),
            "lines": [line.to_dict(bandwidth) for line in self.lines],
        }

    def to_text(self) -> str:
        """A table for people."""
        m = self.machine
        rows = [
            f"{self.bench}: {self.what}",
            f"  {m['cpu']}, {m['threads']} of {m['cores']} threads, device {m['device']}, "
            f"{m['dtype']}, reads {m['read_bandwidth'] / 1e9:.1f} GB/s, torch {m['torch']}, "
            f"transformers {m['transformers']}",
            *(f"  {role}: {path}" for role, path in self.paths.items()),
            "",
        ]
        width = max(len(line.name) for line in self.lines)
        for line in self.lines:
            row = line.to_dict(m["read_bandwidth"])
            cells = [f"{line.name:<{width}}", f"{_figure(row['median'], line.unit):>10}"]
            cells.append(f"±{row['spread']:4.0%}")
            if "tokens_per_s" in row:
                cells.append(f"{row['tokens_per_s']:9,.1f} tokens/s")
            if "of_bandwidth" in row:
                cells.append(
                    f"{row['bytes_per_s'] / 1e9:6.1f} GB/s ({row['of_bandwidth']:.0%} of read)"
                )
            cells += [f"{_ratio(value)} {name}" for name, value in line.ratios.items()]
            rows.append("  " + "  ".join(cells))
            if line.parts:
                told = ", ".join(f"{name} {share:.1%}" for name, share in line.parts.items())
                rows.append(f"  {'':<{width}}  of it: {told}")
        return "\n".join(rows)

    def plot(self, path: Path) -> None:
        """Bars of the medians with their ratios, to a PNG or SVG.

        Raises:
            UsageError: matplotlib is not installed, or the file's ending is not known.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise UsageError("--plot needs matplotlib: pip install 'r2r_glimp[train]'") from None
        lines = self.lines[::-1]
        figure = Figure(figsize=(8, 1 + 0.4 * len(lines)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        medians = [line.sample.median for line in lines]
        errors = [line.sample.spread * line.sample.median for line in lines]
        bars = axes.barh([line.name for line in lines], medians, xerr=errors, color="#4878a8")
        labels = [_figure(line.sample.median, line.unit) for line in lines]
        axes.bar_label(bars, labels, padding=4)
        axes.margins(x=0.15)
        axes.set_title(f"{self.bench}: {self.what}", fontsize=9)
        axes.set_xlabel("seconds; shorter is faster")
        try:
            figure.savefig(path)
        except ValueError as error:
            raise UsageError(f"--plot {path}: {str(error).splitlines()[0]}") from None


def _figure(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.1%}"
    for scale, name in ((1, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{value * scale:.2f} {name}"
    return f"{value * 1e6:.1f} us"


def _ratio(value: float) -> str:
    return f"{value:.2f} x"
