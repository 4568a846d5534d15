"""Graders: from a text to right or wrong. May be called from several threads at once.

text ──after the thinking──▶ final answer ──the known one?──▶ right, wrong, unanswered, undecided
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from labeling.answers import Extract
from labeling.formats import Question

# `undecided`: there is an answer, and whether it is right could not be told.
Grade = Literal["right", "wrong", "unanswered", "undecided"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A grade, the final answer it is about, and what there is to say about it."""

    grade: Grade
    answer: str | None
    note: str | None = None


class Grader(Protocol):
    """Tells right from wrong.

    Attributes:
        workers: texts that are worth grading at once.
    """

    workers: int

    def grade(self, question: Question, text: str) -> Verdict:
        """Whether a text ends at the question's known answer.

        Raises:
            DataError: the question's own data is broken.
            EngineError: the grader itself failed.
        """
        ...

    def close(self) -> None:
        """End what runs on behalf of the grader."""
        ...


class ExactGrader:
    """Right is what is equal as written or, where both are numbers, in value.

    Args:
        extract: the final answer of a text, None where there is none.
    """

    workers = 1

    def __init__(self, extract: Extract) -> None:
        self._extract = extract

    def grade(self, question: Question, text: str) -> Verdict:
        answer = self._extract(text)
        if answer is None:
            return Verdict("unanswered", None)
        return Verdict("right" if same(answer, str(question.answer)) else "wrong", answer)

    def close(self) -> None:
        pass


def same(answer: str, gold: str) -> bool:
    """Equal as written, white space apart, or, if both are numbers, in value."""
    answer, gold = "".join(answer.split()), "".join(gold.split())
    if answer == gold:
        return True
    try:
        return float(answer) == float(gold)
    except ValueError:
        return False
