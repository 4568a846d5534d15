"""A task: questions with known answers, and how a text is graded.

text ──after the thinking──▶ final answer ──equal to the known one?──▶ right, wrong, unanswered
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from labeling.formats import Question
from labeling.sections import SourceConfig
from labeling.sources import find_extract, load_questions, source_name
from r2r_glimp.core import DataError, UsageError

Grade = Literal["right", "wrong", "unanswered"]


@dataclass(frozen=True)
class Task:
    """What is asked, and how answers are told right from wrong.

    Attributes:
        name: what tables call it.
        questions: each with its known answer.
        extract: the final answer of a text, None where there is none.
    """

    name: str
    questions: Sequence[Question]
    extract: Callable[[str], str | None]

    def grade(self, question: Question, text: str) -> Grade:
        """Whether a text ends at the question's known answer."""
        answer = self.extract(text)
        if answer is None:
            return "unanswered"
        return "right" if _same(answer, str(question.answer)) else "wrong"


def load_task(source: SourceConfig, limit: int | None = None) -> Task:
    """The questions of a source, as a task.

    Raises:
        UsageError: nothing says how a final answer is found.
        DataError: the source is missing or broken, or a question has no known answer.
    """
    extract = find_extract(source)
    if extract is None:
        raise UsageError(
            f"how is a final answer of format {source.format} found? "
            "give --task.answer boxed, choice or number"
        )
    questions = load_questions(source, limit=limit)
    for question in questions:
        if question.answer is None:
            raise DataError(
                f"{question.where}: no known answer, nothing can be right: "
                "--task.answer_key names the key that holds it"
            )
    return Task(source_name(source), questions, extract)


def _same(answer: str, gold: str) -> bool:
    """Equal as written or, if both are numbers, in value."""
    answer, gold = "".join(answer.split()), "".join(gold.split())
    if answer == gold:
        return True
    try:
        return float(answer) == float(gold)
    except ValueError:
        return False
