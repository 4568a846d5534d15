"""The page of recorded outputs: who wrote what, and a slider over other thresholds.

One file that reaches for nothing. What was recorded is data within it, never markup.
"""

import html
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from r2r_glimp.core import UsageError
from r2r_glimp.pages import content_policy

TEMPLATE = Path(__file__).with_name("report.html")
Record = dict[str, Any]


def write_report(
    path: Path, name: str, records: list[Record], facts: list[tuple[str, str]]
) -> None:
    """Write the page.

    Args:
        path: the file.
        name: what was recorded, for the title.
        records: checked outputs.
        facts: names and values that stand above them.

    Raises:
        UsageError: the file cannot be written.
    """
    texts = _texts(records)
    outputs = [_output(record, texts) for record in records]
    thresholds = sorted({d["threshold"] for output in outputs for d in output["decisions"]})
    if thresholds:
        shown = ", ".join(f"{value:g}" for value in thresholds[:5])
        facts = [*facts, ("threshold", shown + (", ..." if len(thresholds) > 5 else ""))]
    run = {"name": name, "facts": facts, "thresholds": thresholds, "outputs": outputs}
    # Nothing in the data can end its element, and it is ASCII: lone surrogates stay escapes.
    data = json.dumps(run, allow_nan=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = html.escape(content_policy(template), quote=True)
    page = template.replace("{policy}", policy, 1).replace("{run}", data, 1)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path}: {error.strerror}") from None


def _output(record: Record, texts: dict[int, str]) -> Record:
    """What the page draws of an output."""
    sources = record["sources"]
    rows = {row["position"]: row for row in record.get("trace") or ()}
    rows = {at: rows[at] for at in sorted(rows) if 0 <= at < len(sources)}
    decided = [row for row in rows.values() if row["score"] is not None]
    known = record.get("token_texts") or []
    name = record.get("id") if record.get("id") is not None else record.get("request_id", "")
    answer = next((at for at, row in rows.items() if row.get("phase") == "answer"), len(sources))
    return {
        "name": f"{name} ({record.get('index', 0)})",
        "finish_reason": record["finish_reason"],
        "text": record["text"],
        "texts": known if len(known) == len(sources) else [],
        "sources": sources,
        "answer": answer,
        "steps": _is_per_step(rows),
        "rule": _rule(decided),
        "decisions": [_decision(row, texts) for row in decided],
    }


def _decision(row: Record, texts: dict[int, str]) -> Record:
    slm, llm = row.get("slm_token"), row.get("llm_token")
    return {
        "at": row["position"],
        "score": row["score"],
        "threshold": row["threshold"],
        "deferred": _wanted(row),
        "capped": bool(row.get("capped")),
        "slm": None if slm is None else texts.get(slm, f"<{slm}>"),
        "llm": None if llm is None else texts.get(llm, f"<{llm}>"),
        "same": None if None in (slm, llm) else slm == llm,
    }


def _texts(records: list[Record]) -> dict[int, str]:
    """The text of each token id that was written somewhere."""
    texts: dict[int, str] = {}
    for record in records:
        pairs = zip(record.get("token_ids") or (), record.get("token_texts") or (), strict=False)
        texts |= {token: text for token, text in pairs if text}
    return texts


def _wanted(row: Record) -> bool:
    """The router's verdict, whatever a cap made of it."""
    return bool(row["deferred"] or row.get("capped"))


def _rule(decided: list[Record]) -> str | None:
    """The side of the threshold on which decisions went to the LLM; None where neither fits."""
    if all(_wanted(row) == (row["score"] > row["threshold"]) for row in decided):
        return "above"
    if all(_wanted(row) == (row["score"] < row["threshold"]) for row in decided):
        return "below"
    return None


def _is_per_step(rows: dict[int, Record]) -> bool:
    """Whether decisions handed over more than a token: few follow on one another."""
    thinking = [row for row in rows.values() if row.get("phase") != "answer"]
    after = [b["score"] is None for a, b in pairwise(thinking) if a["score"] is not None]
    return sum(after) * 2 > len(after)
