"""Formats: one function per dataset that turns a row into a question.

Knows nothing of where rows come from.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from labeling.sections import AnswerKind, SourceConfig
from r2r_glimp.core import DataError

Row = Mapping[str, Any]
Fields = tuple[str | None, str, str | None]  # id, question, right answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question, before any model saw it.

    Args:
        id: unique in the run.
        prompt: what the user says.
        source: what the dataset's column says.
        where: file and row, for messages.
        answer: the right one, where known; for the report only.
        response: a given response, for `responses.by=input`.
        kept: further columns of the row, where they were asked for.
    """

    id: str
    prompt: str
    source: str
    where: str
    answer: str | None = None
    response: str | None = None
    kept: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of a dataset are read, and how the final answer to its questions is written."""

    read: Callable[[Row, SourceConfig, str], Fields]
    answer: AnswerKind | None


def text_of(row: Row, key: str, where: str) -> str:
    """A non-empty string of a row; numbers are taken as strings.

    Raises:
        DataError: names file, row and key.
    """
    if key not in row:
        keys = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"{where}: key {key!r} is missing (the row has {keys}): is source.format right? for "
            "plain rows, source.id_key, question_key, answer_key and response_key name the keys"
        )
    value = row[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: key {key!r} is {type(value).__name__}, not a string")
    if not value.strip():
        raise DataError(f"{where}: key {key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        at = f"character {error.start}"
        raise DataError(f"{where}: key {key!r} is not valid Unicode ({at})") from None
    return value


def _plain(row: Row, config: SourceConfig, where: str) -> Fields:
    id = None if config.id_key is None else text_of(row, config.id_key, where)
    answer = None if config.answer_key is None else text_of(row, config.answer_key, where)
    return id, text_of(row, config.question_key, where), answer


def _aime(row: Row, config: SourceConfig, where: str) -> Fields:
    """di-zhang-fdu/AIME_1983_2024 (ID, Question) and Maxwell-Jia/AIME_2024 (ID, Problem)."""
    key = "Problem" if "Problem" in row else "Question"
    return text_of(row, "ID", where), text_of(row, key, where), text_of(row, "Answer", where)


def _gpqa(row: Row, config: SourceConfig, where: str) -> Fields:
    """Idavidrein/gpqa: one right and three wrong answers, shuffled by seed and record."""
    id = text_of(row, "Record ID", where)
    keys = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    choices = [text_of(row, key, where).strip() for key in keys]
    order = list(range(4))
    random.Random(f"{config.seed}-{id}").shuffle(order)
    lines = [f"{letter}) {choices[i]}" for letter, i in zip("ABCD", order, strict=True)]
    question = text_of(row, "Question", where).strip() + "\n\n" + "\n".join(lines)
    return id, question, "ABCD"[order.index(0)]


def _bespoke_stratos(row: Row, config: SourceConfig, where: str) -> Fields:
    """bespokelabs/Bespoke-Stratos-17k: the user's turn of `conversations`; rows have no id."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: key 'conversations' is missing or not a list of turns")
    for turn in turns:
        if turn.get("from") == "user":
            return None, text_of(turn, "value", f"{where}, conversations"), None
    raise DataError(f"{where}: key 'conversations' has no turn with from='user'")


def _livecodebench(row: Row, config: SourceConfig, where: str) -> Fields:
    """livecodebench/code_generation_lite: problem, and starter code where the site gives some."""
    question = text_of(row, "question_content", where)
    starter = row.get("starter_code")
    if starter is not None and not isinstance(starter, str):
        raise DataError(f"{where}: key 'starter_code' is {type(starter).__name__}, not a string")
    if starter:
        question += f"\n\nBegin with this code:\n```python\n{starter}\n```"
    else:
        question += "\n\nRead the input from stdin and write the answer to stdout."
    return text_of(row, "question_id", where), question, None


FORMATS = {
    "plain": Format(_plain, None),
    "aime": Format(_aime, "boxed"),
    "gpqa": Format(_gpqa, "choice"),
    "bespoke-stratos": Format(_bespoke_stratos, None),
    "livecodebench": Format(_livecodebench, None),
}
