"""The report as one HTML file: no script, nothing fetched."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_COLORS = {"identical": "#c9d3dc", "neutral": "#e3b23c", "divergent": "#b23a48"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .15rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left }
.bar { display: flex; height: .9rem; min-width: 12rem }
.key { border-left: 1rem solid; padding: 0 .8rem 0 .3rem }
.example { border-left: 4px solid; margin: .8rem 0; padding: .2rem .8rem; background: #fafafa }
pre { white-space: pre-wrap; margin: .2rem 0; font: 13px/1.4 ui-monospace, monospace }
.before { color: #777 } b { font-weight: 600 } small { color: #666 }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #ddd } .example { background: #1e2125 }
}
"""


def render_html(summary: Mapping[str, Any]) -> str:
    """A page with class shares as tables and bars, and examples with both continuations."""
    counts = summary["counts"]
    keys = (
        f'<span class="key" style="border-color:{c}">{name}</span>' for name, c in _COLORS.items()
    )
    body = [
        "<h1>Labels</h1>",
        f"<p>{counts.get('questions', 0):,} questions, {counts.get('responses', 0):,} responses "
        f"(by {escape(summary['responses_by'])}), {counts['rows']:,} rows, "
        f"verifier {escape(summary['verifier'])}.</p>",
        f"<p>{''.join(keys)}</p>",
    ]
    body += [_part(kind, summary[kind]) for kind in ("tokens", "steps") if summary[kind]["total"]]
    rows = ((name.replace("_", " "), f"{value:,}") for name, value in counts.items())
    body.append("<h2>Counts</h2>" + _table(("", "number"), rows))
    rows = ((name, f"{value:,.1f}") for name, value in summary.get("seconds", {}).items())
    body.append("<h2>Seconds</h2>" + _table(("stage", "seconds"), rows))
    for kind, by_class in summary["examples"].items():
        for name, examples in by_class.items():
            if examples:
                shown = "".join(map(_example, examples))
                body.append(f"<h2>{name.capitalize()} {kind}s</h2>{shown}")
    head = f'<meta charset="utf-8"><title>Labels</title><style>{_STYLE}</style>'
    page = f'<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'
    return f"<!doctype html>\n{page}\n"


def _part(kind: str, part: Mapping[str, Any]) -> str:
    shares = [("all", part)]
    shares += [(f"{p['from']:.0%} of the answer on", p) for p in part["by_position"]]
    shares += [*part["by_phase"].items(), *part["by_source"].items()]
    rows = (
        (
            escape(name),
            f"{share['total']:,}",
            *(f"{share['shares'][c]:.2%}" for c in _COLORS),
            _bar(share["shares"]),
        )
        for name, share in shares
        if share["total"]
    )
    known = {name: value for name, value in part["mean_entropy"].items() if value is not None}
    entropy = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
    title = f"<h2>{kind.capitalize()}</h2><p>Mean entropy of the SLM there (nats): {entropy}.</p>"
    return title + _table(("", kind, *_COLORS, ""), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _bar(shares: Mapping[str, float]) -> str:
    parts = (
        f'<span style="width:{shares[name]:.3%};background:{color}"></span>'
        for name, color in _COLORS.items()
    )
    return f'<div class="bar">{"".join(parts)}</div>'


def _example(example: Mapping[str, Any]) -> str:
    note = f", {escape(example['note'])}" if example["note"] else ""
    where = f"{escape(example['response_id'])}, position {example['position']}{note}"
    question = escape(example["question"])
    parts = [
        f"<details><summary><small>{where}</small></summary><pre>{question}</pre></details>",
        f'<pre class="before">…{escape(example["before"][-200:])}</pre>',
        _way("slm", example),
        _way("llm", example),
    ]
    color = _COLORS[example["label"]]
    return f'<div class="example" style="border-color:{color}">{"".join(parts)}</div>'


def _way(model: str, example: Mapping[str, Any]) -> str:
    answer = example[f"{model}_answer"]
    ends = f" <small>ends at {escape(str(answer))}</small>" if answer is not None else ""
    return f"<b>{model.upper()}</b>{ends}<pre>{escape(example[model])}</pre>"
