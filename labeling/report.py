"""Report: what was labeled, in numbers and in examples to read. As JSON, text and HTML.

`summary.json` holds everything the other forms show, so they can be made again from it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from labeling.config import LabelingConfig
from labeling.report_html import render_html
from labeling.schema import Label, Phase
from labeling.shards import write_atomic
from r2r_glimp.core import DataError

CLASSES = ("identical", "neutral", "divergent")
NUM_PARTS = 10  # of an answer, for shares by position
_NUM_EXAMPLES = 8  # of each class


def summarize(
    paths: Iterable[Path], counts: Mapping[str, int], config: LabelingConfig
) -> dict[str, Any]:
    """Class shares by position, phase and source, and examples of each class, from shard files."""
    tables, answers = [], []
    wanted = ["source", "position", "phase", "response_id", "label", "step_label", "entropy"]
    for path in paths:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
            answers += json.loads(table.schema.metadata[b"labeling"])
            tables.append(table.select(wanted).replace_schema_metadata(None))
    table = pa.concat_tables(tables)
    lengths = {answer["response_id"]: answer["num_tokens"] for answer in answers}
    ids = table["response_id"].combine_chunks().dictionary_encode()
    length_of = np.array([lengths[id] for id in ids.dictionary.to_pylist()])
    length = length_of[ids.indices.to_numpy()] if len(length_of) else np.zeros(0)
    part = (table["position"].to_numpy() * NUM_PARTS // np.maximum(length, 1)).astype(int)
    columns = {
        "part": part,
        "phase": table["phase"].to_numpy(),
        "source": table["source"].to_numpy(),
        "entropy": table["entropy"].to_numpy(),
    }
    return {
        "granularity": config.granularity,
        "verifier": config.verifier.kind,
        "responses_by": config.responses.by,
        "counts": dict(counts),
        "tokens": _shares(table["label"].to_numpy(), columns),
        "steps": _shares(table["step_label"].to_numpy(), columns),
        "examples": {kind: _examples(answers, kind) for kind in ("token", "step")},
    }


def write_report(out: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` and `report.html`."""
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    write_atomic(out / "summary.json", text.encode("utf-8", "replace"))
    write_atomic(out / "report.html", render_html(summary).encode("utf-8", "replace"))


def load_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run, by the run's folder or its dataset's, or of a published one.

    Raises:
        DataError: there is none.
    """
    beside = folder.parent / "summary.json"
    path = folder / "summary.json"
    if folder.name == "dataset" and not path.exists() and beside.exists():
        path = beside
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or "examples" not in summary:
            raise ValueError("it is not of labels")
        return summary
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file: the labeling run is not finished, run the same command again"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path} cannot be read ({error}): run the labeling command again"
        ) from None


def render_text(summary: Mapping[str, Any], *, num_examples: int = 0) -> str:
    """The summary for a terminal, with so many examples of each class."""
    counts = summary["counts"]
    dropped = {k.removeprefix("dropped_"): v for k, v in counts.items() if k.startswith("dropped_")}
    lines = [
        f"{counts.get('questions', 0):,} questions, {counts.get('responses', 0):,} responses, "
        f"{counts['rows']:,} rows" + (f"; dropped: {_pairs(dropped)}" if dropped else "")
    ]
    if counts.get("with_right_answer"):
        lines.append(f"responses right: {counts.get('right', 0) / counts['with_right_answer']:.1%}")
    for kind in ("tokens", "steps"):
        part = summary[kind]
        if part["shares"]:
            shares = ", ".join(f"{name} {part['shares'][name]:.2%}" for name in CLASSES)
            lines.append(f"{kind:6} {part['total']:9,}: {shares}")
    notes = {
        n: counts[n]
        for n in ("unanswered", "no_reference", "unparsable", "disagreement")
        if counts.get(n)
    }
    if notes:
        lines.append(f"noted: {_pairs(notes)}")
    for kind, by_class in summary["examples"].items():
        for name in CLASSES:
            for example in by_class.get(name, [])[:num_examples]:
                lines += [
                    "",
                    f"{name} {kind}, {example['response_id']} position {example['position']}",
                ]
                lines += [f"  before {example['before'][-80:]!r}"]
                lines += [f"  {model}    {example[model][:100]!r}" for model in ("slm", "llm")]
    return "\n".join(lines)


def _shares(labels: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    kept = labels != Label.UNLABELED
    labels = labels[kept]
    part, phase, source, entropy = (
        columns[name][kept] for name in ("part", "phase", "source", "entropy")
    )
    by_part = [_share(labels[part == i]) | {"from": i / NUM_PARTS} for i in range(NUM_PARTS)]
    return {
        **_share(labels),
        "by_position": by_part,
        "by_phase": {p.name.lower(): _share(labels[phase == p]) for p in Phase},
        "by_source": {str(s): _share(labels[source == s]) for s in sorted(set(source.tolist()))},
        "mean_entropy": {
            name: round(float(entropy[labels == label].mean()), 4)
            if (labels == label).any()
            else None
            for label, name in enumerate(CLASSES)
        },
    }


def _share(labels: np.ndarray) -> dict[str, Any]:
    counts = {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)}
    total = len(labels)
    shares = {name: n / total for name, n in counts.items()} if total else {}
    return {"total": total, "counts": counts, "shares": shares}


def _examples(answers: list[dict[str, Any]], kind: str) -> dict[str, list[dict[str, Any]]]:
    """A few forks of each class, of different answers as far as there are."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CLASSES}
    for turn in range(3):
        for answer in answers:
            for name in CLASSES:
                forks = [f for f in answer["forks"] if f["kind"] == kind and f["label"] == name]
                if len(found[name]) < _NUM_EXAMPLES and len(forks) > turn:
                    about = {key: answer[key] for key in ("response_id", "source", "question")}
                    # The middle one: the first differences of all answers are alike.
                    found[name].append(about | forks[(turn + len(forks) // 2) % len(forks)])
    return found


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in counts.items())
