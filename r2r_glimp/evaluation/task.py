"""A task: questions with known answers, and what tells a right answer from a wrong one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from labeling.answers import EXTRACTORS
from labeling.formats import Question
from labeling.sections import AnswerKind, SourceConfig
from labeling.sources import answer_kind, load_questions, source_name
from r2r_glimp.core import DataError, UsageError
from r2r_glimp.evaluation.grading.code_grader import CodeGrader
from r2r_glimp.evaluation.grading.grader import ExactGrader, Grader, Verdict
from r2r_glimp.evaluation.grading.livecodebench import COLUMNS, has_tests
from r2r_glimp.evaluation.grading.math_grader import MathGrader


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingOptions:
    """How answers are graded; what `--task.answer` says decides between graders.

    Args:
        allow_code_execution: run programs that a model wrote (answer: code), each in a limited
            process: that contains accidents, and is no sandbox.
        grader_timeout: seconds for one comparison of formulas, or for one test of a program.
        grader_workers: formulas or programs graded at once; by default as many as there are cores,
            four at most.
    """

    allow_code_execution: bool = False
    grader_timeout: float = 10.0
    grader_workers: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.grader_timeout < float("inf"):
            raise UsageError(f"--grader_timeout {self.grader_timeout} is out of range: above 0")
        if self.grader_workers is not None and self.grader_workers < 1:
            raise UsageError(f"--grader_workers {self.grader_workers} is out of range: 1 or more")


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, and who grades.

    Attributes:
        name: what tables call it.
        questions: each with its known answer.
        grader: tells right from wrong.
    """

    name: str
    questions: Sequence[Question]
    grader: Grader

    def grade(self, question: Question, text: str) -> Verdict:
        """Whether a text ends at the question's known answer."""
        return self.grader.grade(question, text)


def load_task(
    source: SourceConfig, limit: int | None = None, grading: GradingOptions | None = None
) -> Task:
    """The questions of a source, as a task.

    Raises:
        UsageError: nothing says how a final answer is found, or programs would have to be run and
            may not.
        DataError: the source is missing, empty or broken, or a question has no known answer.
    """
    grading = grading or GradingOptions()
    kind = answer_kind(source)
    if kind is None:
        raise UsageError(
            f"how is a final answer of format {source.format} found? "
            "give --task.answer boxed, math, choice, number, text or code"
        )
    grader = _make_grader(kind, grading)
    is_code = kind == "code"
    questions = load_questions(source, limit=limit, keep=COLUMNS if is_code else ())
    for question in questions:
        if is_code and not has_tests(question):
            raise DataError(
                f"{question.where}: no tests, nothing can be right: "
                "answers of kind code need public_test_cases or private_test_cases"
            )
        if not is_code and question.answer is None:
            raise DataError(
                f"{question.where}: no known answer, nothing can be right: "
                "--task.answer_key names the key that holds it"
            )
    return Task(source_name(source), questions, grader)


def _make_grader(kind: AnswerKind, options: GradingOptions) -> Grader:
    workers = options.grader_workers or min(4, os.cpu_count() or 1)
    if kind == "math":
        return MathGrader(options.grader_timeout, workers)
    if kind != "code":
        return ExactGrader(EXTRACTORS[kind])
    if not options.allow_code_execution:
        raise UsageError(
            "grading runs programs that a model wrote: say --allow_code_execution, "
            "best on a machine that has nothing to lose"
        )
    return CodeGrader(options.grader_timeout, workers)
