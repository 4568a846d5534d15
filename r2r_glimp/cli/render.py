"""Who wrote what, for people: marked text, a legend, a line of figures, tables and histograms.

The LLM's text is bold, underlined and coloured in a terminal; without colour it is in brackets.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from r2r_glimp.core import Stats

_STYLE, _RESET = "\x1b[1;4;36m", "\x1b[0m"
# A model's control characters must not steer the terminal: they are shown as pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
BAR_WIDTH = 40


def use_color(stream: TextIO, *, no_color: bool = False) -> bool:
    """Whether a stream takes colours: a terminal, unless NO_COLOR or the option says no."""
    if no_color or os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Marks:
    """How the LLM's text begins and ends on a stream."""

    def __init__(self, stream: TextIO, *, color: bool) -> None:
        self.color = color
        self.open, self.close = (_STYLE, _RESET) if color else ("⟦", "⟧")
        try:
            self.open.encode(stream.encoding or "utf-8")
        except UnicodeEncodeError:
            self.open, self.close = "[[", "]]"

    @property
    def legend(self) -> str:
        """What the marks mean."""
        how = "bold and underlined" if self.color else "in brackets"
        return f"SLM plain, {self.open}LLM {how}{self.close}"


class SpanWriter:
    """Writes text piece by piece, marked by who wrote it."""

    def __init__(self, stream: TextIO, marks: Marks) -> None:
        self._stream = stream
        self._marks = marks
        self._in_llm = False

    def write(self, source: str, text: str) -> None:
        """What one model wrote; out at once."""
        if not text:
            return
        if (source == "llm") != self._in_llm:
            self._switch()
        self._stream.write(visible(text))
        self._stream.flush()

    def close(self) -> None:
        """End the marked text; no newline."""
        if self._in_llm:
            self._switch()
        self._stream.flush()

    def _switch(self) -> None:
        self._stream.write(self._marks.close if self._in_llm else self._marks.open)
        self._in_llm = not self._in_llm


def visible(text: str) -> str:
    """Text without power over the terminal; newlines and tabs stay."""
    return text.translate(_VISIBLE)


def set_encoding(stream: TextIO, **how: str) -> None:
    """`errors="replace"` makes `?` of what a stream cannot show; a stream that is no file stays."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(**how)


def figures(stats: Iterable[Stats], elapsed_s: float, finish_reasons: Sequence[str] = ()) -> str:
    """One line: LLM share, tokens, decisions, switches, speed, memory, what did not just stop."""
    stats = list(stats)
    total = {name: sum(getattr(s, name) for s in stats) for name in Stats.__slots__}
    slm, llm = total["slm_tokens"], total["llm_tokens"]
    parts = [
        f"LLM share {llm / max(1, slm + llm):.1%}",
        f"{slm + llm:,} tokens ({slm:,} SLM, {llm:,} LLM)",
        f"{total['decisions']:,} decisions, {total['deferrals']:,} to the LLM",
        f"{total['switches']:,} switches",
        f"{(slm + llm) / max(elapsed_s, 1e-9):,.0f} tokens/s",
        f"peak memory {format_bytes(peak_memory())}",
    ]
    if gpu := peak_gpu_memory():
        parts.append(f"peak GPU memory {format_bytes(gpu)}")
    if total["prefix_hits"]:
        parts.append(f"{total['prefix_hits']:,} prompt tokens from the prefix cache")
    unusual = [reason for reason in finish_reasons if reason != "stop"]
    parts += [f"{unusual.count(reason)} ended by {reason}" for reason in sorted(set(unusual))]
    return " | ".join(parts)


def peak_memory() -> int:
    """Bytes of main memory this process held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int:
    """Bytes of GPU memory torch held at most; 0 without a GPU in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def format_bytes(size: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def decisions_table(
    trace: Sequence[dict[str, Any]],
    name_of: Callable[[int], str] = "token {}".format,
    limit: int | None = None,
) -> str:
    """The decisions of a trace, one a line: where, the score, who wrote what, the LLM's own choice.

    Args:
        trace: decisions as plain values; positions without a score are left out.
        name_of: a token id's text.
        limit: lines at most.
    """
    decided = [row for row in trace if row.get("score") is not None]
    head = (
        "position",
        "phase",
        "score",
        "threshold",
        "writer",
        "SLM's choice",
        "written",
        "LLM's own choice",
    )
    lines = ["{:>8}  {:<8}  {:>7}  {:>9}  {:<9}  {:<14}  {:<14}  {}".format(*head)]
    for row in decided[:limit]:
        slm, written, llm = (row.get(key) for key in ("slm_token", "token", "llm_token"))
        texts = [_token(token, name_of) for token in (slm, written)]
        own = "" if llm is None else "the same" if llm == written else _token(llm, name_of)
        writer = row["source"].upper() + (" (cap)" if row.get("capped") else "")
        threshold = row.get("threshold") or 0.0
        lines.append(
            f"{row['position']:>8}  {row.get('phase', ''):<8}  {row['score']:>7.3f}  "
            f"{threshold:>9.3f}  {writer:<9}  {texts[0]:<14}  {texts[1]:<14}  {own}".rstrip()
        )
    if limit is not None and len(decided) > limit:
        lines.append(f"{'...':>8}  {len(decided) - limit:,} more")
    return "\n".join(lines)


def _token(token: int | None, name_of: Callable[[int], str]) -> str:
    """A token's text within quotes, cut to a column."""
    if token is None:
        return ""
    text = repr(visible(name_of(token)))
    return text if len(text) <= 14 else text[:13] + "…"


def histogram(scores: Sequence[float], threshold: float | None = None, num_bins: int = 12) -> str:
    """Counts of scores in equal bins, one a line; the threshold's bin is marked."""
    low, high = min(scores), max(scores)
    width = (high - low) / num_bins or 1.0
    counts = [0] * num_bins
    for score in scores:
        counts[min(int((score - low) / width), num_bins - 1)] += 1
    lines = []
    for i, count in enumerate(counts):
        start = low + i * width
        bar = "#" * -(-count * BAR_WIDTH // max(counts))
        here = threshold is not None and start <= threshold < start + width
        mark = f"  < threshold {threshold:g}" if here else ""
        lines.append(f"{start:>8.3f} to {start + width:>6.3f}  {bar} {count:,}{mark}")
    return "\n".join(lines)


def aligned(rows: Sequence[tuple[str, Any]], indent: int = 0) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{' ' * indent}{name:<{width}}  {value}" for name, value in rows)
