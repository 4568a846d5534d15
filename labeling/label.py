"""The stages of one answer, in order, and what comes out of them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from labeling.batch import Task
from labeling.compare import Comparison, compare
from labeling.continue_ import Branch, Fork, continue_
from labeling.formats import Question
from labeling.respond import Dropped, Response, respond
from labeling.schema import Label, labeled_dataset, labeled_features, observation_columns
from labeling.setting import Setting
from labeling.steps import Layout, StepForks, continue_steps, find_layout
from labeling.traces import agreement
from labeling.verifiers import Verdict
from labeling.verify import verify

_EXAMPLE_CHARS = 400  # of a branch, kept to be read
_EXAMPLES = 4  # forks of each class, of one answer, kept to be read


@dataclass(frozen=True, slots=True)
class Judged:
    """A fork of tokens or of steps, with its verdict."""

    kind: Literal["token", "step"]
    fork: Fork
    verdict: Verdict


@dataclass(slots=True)
class Labeled:
    """An answer with a label at each position."""

    response: Response
    comparison: Comparison
    layout: Layout
    labels: list[Label]
    step_labels: list[Label]
    judged: list[Judged] = field(default_factory=list)


def label(question: Question, index: int, setting: Setting) -> Task[Labeled | Dropped]:
    """All stages of the `index`-th answer to a question."""
    response = yield from respond(question, index, setting)
    if isinstance(response, Dropped):
        return response
    return (yield from label_response(response, setting))


def label_response(response: Response, setting: Setting) -> Task[Labeled]:
    """The stages after the answer is there."""
    config = setting.config
    comparison = yield from compare(response, setting)
    layout = find_layout(response, setting)
    labels = [Label.UNLABELED] * len(response.tokens)
    step_labels = list(labels)
    forks: list[Fork] = []
    steps = StepForks([], [])
    if config.label_tokens:
        labels = agreement(comparison.candidates, comparison.references)
        if config.verifier.kind != "identical":
            forks = yield from continue_(response, comparison, setting)
    if config.label_steps:
        steps = yield from continue_steps(response, comparison, layout, forks, setting)
    # Verdicts come last: how long a judge takes then changes nothing that the engine does.
    verdicts = yield from verify(response, [*forks, *steps.forks], setting)
    judged = [
        Judged("token" if i < len(forks) else "step", fork, verdict)
        for i, (fork, verdict) in enumerate(zip([*forks, *steps.forks], verdicts, strict=True))
    ]
    for position in steps.identical:
        step_labels[position] = Label.IDENTICAL
    for one in judged:
        where = labels if one.kind == "token" else step_labels
        where[one.fork.position] = one.verdict.label
    return Labeled(response, comparison, layout, labels, step_labels, judged)


def to_table(labeled: list[Labeled], setting: Setting) -> pa.Table:
    """Rows of the dataset, in order: one per position. Where tokens are labeled, those without a
    verdict are left out."""
    if not labeled:
        size, top_k = setting.slm.fingerprint.hidden_size, setting.config.top_k_logits
        return labeled_features(size, top_k).arrow_schema.empty_table()
    parts = [_columns(one) for one in labeled]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    table = labeled_dataset(columns).data.table
    if not setting.config.label_tokens:
        return table
    return table.filter(pa.array(columns["label"] != Label.UNLABELED))


def describe(one: Labeled) -> dict[str, Any]:
    """An answer and its forks, to be read in the report."""
    response = one.response
    return {
        "question_id": response.question.id,
        "response_id": response.id,
        "source": response.question.source,
        "question": response.question.prompt,
        "response": response.text,
        "answer": response.answer,
        "right_answer": response.question.answer,
        "num_tokens": len(response.tokens),
        "forks": [
            _describe(judged, response) for judged in [*_some(one.judged), *_least_sure(one)]
        ],
    }


def count(results: list[Labeled | Dropped], num_rows: int) -> dict[str, int]:
    """Numbers that can be added up over shards."""
    counts: Counter[str] = Counter(responses=len(results), rows=num_rows)
    for one in results:
        if isinstance(one, Dropped):
            counts[f"dropped_{one.reason}"] += 1
            continue
        response = one.response
        counts["tokens"] += len(response.tokens)
        if response.answer is not None and response.question.answer is not None:
            counts["with_right_answer"] += 1
            counts["right"] += response.answer == response.question.answer
        counts["steps"] += len(one.layout.starts)
        for judged in one.judged:
            counts[f"{judged.kind}_forks"] += 1
            if judged.verdict.note:
                counts[judged.verdict.note] += 1
    return dict(sorted(counts.items()))


def _columns(one: Labeled) -> dict[str, np.ndarray]:
    response, num = one.response, len(one.response.tokens)
    step_start = np.zeros(num, bool)
    step_start[one.layout.starts] = True
    return {
        "question_id": np.full(num, response.question.id, object),
        "response_id": np.full(num, response.id, object),
        "source": np.full(num, response.question.source, object),
        "position": np.arange(num, dtype=np.int32),
        "phase": np.array(one.layout.phases, np.int8),
        "step_start": step_start,
        "token": np.array(response.tokens, np.int32),
        "label": np.array(one.labels, np.int8),
        "step_label": np.array(one.step_labels, np.int8),
        **observation_columns(one.comparison.observation),
    }


def _describe(judged: Judged, response: Response) -> dict[str, Any]:
    fork = judged.fork
    return {
        "kind": judged.kind,
        "position": fork.position,
        "label": judged.verdict.label.name.lower(),
        "note": judged.verdict.note,
        "before": "".join(response.pieces[: fork.position])[-_EXAMPLE_CHARS:],
        "slm": fork.slm.text[:_EXAMPLE_CHARS],
        "llm": fork.llm.text[:_EXAMPLE_CHARS],
        "slm_answer": fork.slm.answer,
        "llm_answer": fork.llm.answer,
    }


def _some(judged: list[Judged]) -> list[Judged]:
    """A few forks of each class, from all over the answer."""
    by_class: dict[tuple[str, Label], list[Judged]] = {}
    for one in judged:
        by_class.setdefault((one.kind, one.verdict.label), []).append(one)
    kept = []
    for forks in by_class.values():
        count = min(_EXAMPLES, len(forks))
        kept += [forks[i * len(forks) // count] for i in range(count)]
    return kept


def _least_sure(one: Labeled) -> list[Judged]:
    """An identical position to be read too: the one where the SLM was least sure."""
    entropy = one.comparison.observation.entropy_N
    positions = [p for p, label in enumerate(one.labels) if label is Label.IDENTICAL]
    if not positions or entropy is None:
        return []
    position = max(positions, key=lambda p: (entropy[p].item(), -p))
    response = one.response
    way = Branch(response.tokens[position:], "".join(response.pieces[position:]), response.answer)
    return [Judged("token", Fork(position, "", way, way), Verdict(Label.IDENTICAL))]
