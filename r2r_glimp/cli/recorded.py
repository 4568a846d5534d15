"""Recorded outputs: who wrote what, how often, and at which scores."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import Namespace

from r2r_glimp.cli.errors import say
from r2r_glimp.cli.outputs import check_writable
from r2r_glimp.cli.render import (
    Marks,
    SpanWriter,
    aligned,
    decisions_table,
    histogram,
    use_color,
    visible,
)
from r2r_glimp.cli.report import write_report
from r2r_glimp.cli.requests import parse_json_object
from r2r_glimp.core import DataError, UsageError

Record = dict[str, Any]


def inspect(path: Path, options: Namespace, stream: TextIO) -> tuple[Record, str]:
    """A file of outputs, as figures and as text for a stream; and as a page, with --html.

    Raises:
        DataError: not readable, empty, or a line is not an output.
        UsageError: the page cannot be written, or is there and not to be overwritten.
    """
    page = None if options.html is None else Path(options.html)
    if page is not None:
        if page.exists() and page.samefile(path):
            raise UsageError(f"--html {page} is the file that is read: give another")
        check_writable(page, overwrite=options.overwrite, option="--html")
    records = read_outputs(path)
    facts: Record = {"kind": "outputs", "name": str(path)} | summarize(records)
    marks = Marks(stream, color=use_color(stream, no_color=options.no_color))
    if page is not None:
        write_report(page, path.name, records, _summary(facts))
        say("written", str(page))
    parts = [f"{facts['outputs']:,} outputs of {path}", aligned(_summary(facts), indent=2)]
    scores = [row["score"] for row in _decisions(records)]
    if scores:
        thresholds = {row["threshold"] for row in _decisions(records)}
        parts += ["scores", histogram(scores, thresholds.pop() if len(thresholds) == 1 else None)]
    else:
        parts.append("no decisions are recorded: run generate with --trace to see them")
    if options.signals:
        from r2r_glimp.evaluation.step_signals import read_steps, summarise_signals, to_text

        steps = read_steps(records)
        summaries = summarise_signals(steps)
        facts["signals"] = {"steps": len(steps), "rows": [asdict(row) for row in summaries]}
        parts += ["", to_text(steps, summaries), ""]
    if options.show:
        parts.append(f"{marks.legend}\n")
    for record in records[: options.show]:
        parts.append(_output_text(record, marks, options.decisions))
    return facts, "\n".join(parts)


def read_outputs(path: Path) -> list[Record]:
    """The outputs of a JSONL file.

    Raises:
        DataError: not readable, empty, or a line is not an output.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    records = []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            records.append(_check(parse_json_object(raw)))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not records:
        raise DataError(f"{path} is empty")
    return records


def summarize(records: list[Record]) -> Record:
    """Counts over all outputs."""
    sources = Counter(source for record in records for source in record["sources"])
    decided = _decisions(records)
    deferred = sum(row["deferred"] for row in decided)
    slm_rows = [
        row for record in records for row in record.get("trace") or () if row["source"] == "slm"
    ]
    known = [row for row in slm_rows if row.get("llm_token") is not None]
    same = sum(row["llm_token"] == row["token"] for row in known)
    total = sum(sources.values())
    return {
        "outputs": len(records),
        "finish_reasons": dict(Counter(record["finish_reason"] for record in records)),
        "tokens": total,
        "slm_tokens": sources["slm"],
        "llm_tokens": sources["llm"],
        "llm_share": sources["llm"] / max(1, total),
        "switches": sum(record["stats"].get("switches", 0) for record in records),
        "decisions": len(decided),
        "deferrals": deferred,
        "capped": sum(bool(row.get("capped")) for row in decided),
        # Told for free where the LLM caught up over what the SLM had written.
        "slm_tokens_compared": len(known),
        "slm_tokens_identical": same,
    }


def _check(record: Record) -> Record:
    """An output as `generate --json` writes it."""
    sources, trace, stats = record.get("sources"), record.get("trace"), record.get("stats")
    ids, texts = record.get("token_ids"), record.get("token_texts")
    ok = (
        isinstance(record.get("text"), str)
        and isinstance(record.get("finish_reason"), str)
        and isinstance(stats, dict)
        and _is_number(stats.get("switches", 0))
        and isinstance(sources, list)
        and all(source in ("slm", "llm") for source in sources)
        and _is_list(ids, int)
        and _is_list(texts, str)
        and (trace is None or (isinstance(trace, list) and all(_is_decision(row) for row in trace)))
    )
    if not ok:
        raise DataError("not an output of `r2r-glimp generate --json`")
    return record


def _is_decision(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.get("source") in ("slm", "llm")
        and all(isinstance(row.get(name), int) for name in ("position", "token", "deferred"))
        and all(isinstance(row.get(name, 0), int | None) for name in ("slm_token", "llm_token"))
        and isinstance(row.get("phase", ""), str)
        # Where a decision was taken, it has a score and a threshold.
        and (
            row.get("score", 0) is None
            or (_is_number(row.get("score")) and _is_number(row.get("threshold")))
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -1e300 < value < 1e300


def _is_list(value: Any, kind: type) -> bool:
    """Whether something is a list of a kind, or is not there."""
    return value is None or (
        isinstance(value, list) and all(isinstance(item, kind) for item in value)
    )


def _decisions(records: list[Record]) -> list[Record]:
    return [
        row for record in records for row in record.get("trace") or () if row["score"] is not None
    ]


def _summary(facts: Record) -> list[tuple[str, str]]:
    """The figures, by their names."""
    reasons = ", ".join(
        f"{count:,} {reason}" for reason, count in sorted(facts["finish_reasons"].items())
    )
    slm, llm = facts["slm_tokens"], facts["llm_tokens"]
    rows = [
        ("LLM share", f"{facts['llm_share']:.1%}"),
        (
            "tokens",
            f"{facts['tokens']:,} ({slm:,} SLM, {llm:,} LLM), {facts['switches']:,} switches",
        ),
        ("ended by", reasons),
    ]
    if facts["decisions"]:
        share = facts["deferrals"] / facts["decisions"]
        capped = f", {facts['capped']:,} held back by the cap" if facts["capped"] else ""
        rows.append(
            (
                "decisions",
                f"{facts['decisions']:,}, {facts['deferrals']:,} to the LLM ({share:.1%}){capped}",
            )
        )
    if facts["slm_tokens_compared"]:
        same, compared = facts["slm_tokens_identical"], facts["slm_tokens_compared"]
        rows.append(
            (
                "SLM as the LLM",
                f"{same:,} of {compared:,} tokens are the LLM's choice too ({same / compared:.1%})",
            )
        )
    return rows


def _output_text(record: Record, marks: Marks, num_decisions: int) -> str:
    name = record.get("id") if record.get("id") is not None else record.get("request_id", "")
    parts = [f"--- {visible(str(name))} ({record.get('index', 0)})", _marked(record, marks)]
    if record.get("trace") and num_decisions:
        texts = dict(zip(record.get("token_ids", ()), record.get("token_texts", ()), strict=False))
        name_of = lambda token: texts.get(token) or f"<{token}>"  # noqa: E731
        parts += ["", decisions_table(record["trace"], name_of, num_decisions)]
    return "\n".join(parts) + "\n"


def _marked(record: Record, marks: Marks) -> str:
    """The text, marked where the texts of its tokens are known."""
    import io

    texts = record.get("token_texts")
    if not isinstance(texts, list) or len(texts) != len(record["sources"]):
        return visible(record["text"])
    out = io.StringIO()
    writer = SpanWriter(out, marks)
    for source, text in zip(record["sources"], texts, strict=True):
        writer.write(source, str(text))
    writer.close()
    return out.getvalue()
