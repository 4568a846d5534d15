"""Graders: answers as written, formulas in value, programs under limits."""

import base64
import json
import pickle
import subprocess
import time
import zlib
from typing import Any

import pytest

from labeling.answers import final_choice, final_code, final_text
from labeling.formats import Question
from r2r_glimp.core import DataError
from r2r_glimp.evaluation.grading.code_grader import CodeGrader, same_output
from r2r_glimp.evaluation.grading.grader import ExactGrader
from r2r_glimp.evaluation.grading.livecodebench import CodeTest, pickled_string, read_tests
from r2r_glimp.evaluation.grading.math_grader import MathGrader


def question(answer: str | None = None, **kept: Any) -> Question:
    return Question(id="a", prompt="?", source="t", where="x:1", answer=answer, kept=kept)


def packed(value: Any) -> str:
    """As the published set has its hidden tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_exact_answers_are_equal_as_written_or_in_value() -> None:
    grader = ExactGrader(final_text)
    verdicts = [
        grader.grade(question("7.50"), f"hm</think> {t}") for t in ("7.5", "7.50", "7.4", "")
    ]
    assert [v.grade for v in verdicts] == ["right", "right", "wrong", "unanswered"]
    assert verdicts[0].answer == "7.5" and verdicts[3].answer is None


def test_the_last_choice_counts() -> None:
    grader = ExactGrader(final_choice)
    text = "Answer: A</think> The answer is B. No: **Answer: (C)**"
    assert grader.grade(question("C"), text).grade == "right"
    assert grader.grade(question("C"), "Answer: none of them").grade == "unanswered"


@pytest.fixture(scope="module")
def formulas():
    pytest.importorskip("math_verify")
    grader = MathGrader(timeout_s=20, workers=1)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("gold", "answer", "grade"),
    [
        (r"\frac{1}{2}", "0.5", "right"),
        ("p - q", "-q + p", "right"),
        ("033", "33", "right"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", "right"),
        ("2", "3", "wrong"),
        ("2", r"\smile", "wrong"),
    ],
)
def test_formulas_are_equal_in_value(
    formulas: MathGrader, gold: str, answer: str, grade: str
) -> None:
    text = f"\\boxed{{1}}</think> so \\boxed{{{answer}}}."
    assert formulas.grade(question(gold), text).grade == grade


def test_no_formula_is_no_answer(formulas: MathGrader) -> None:
    assert formulas.grade(question("2"), "It is 2.").grade == "unanswered"
    assert formulas.grade(question(""), r"\boxed{2}").note == "the known answer cannot be parsed"


def test_a_formula_that_never_ends_is_undecided_and_the_next_one_is_not(
    formulas: MathGrader,
) -> None:
    formulas.grade(question("2"), r"\boxed{1}")  # the process has started
    formulas._timeout_s, before = 0.5, formulas._timeout_s
    started = time.monotonic()
    verdict = formulas.grade(question("1"), r"\boxed{10^{10^{10}}}")
    assert verdict.grade == "undecided" and "longer than 0.5 s" in str(verdict.note)
    assert time.monotonic() - started < 10
    formulas._timeout_s = before
    assert formulas.grade(question("1/2"), r"\boxed{0.5}").grade == "right"


FUNCTIONAL = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]
STDIN = [{"input": "4\n", "output": "8\n", "testtype": "stdin"}]


@pytest.fixture(scope="module")
def programs() -> CodeGrader:
    return CodeGrader(timeout_s=3, workers=1)


def answered(code: str) -> str:
    return f"```\nno\n```</think> First:\n```python\nraise\n```\nthen\n```python\n{code}\n```"


@pytest.mark.parametrize(
    ("code", "grade"),
    [
        ("print(2 * int(input()))", "right"),
        ("import sys\nprint('8.0  '); sys.exit(0)", "right"),
        (
            "import threading\ndef main(): print(2 * int(input()))\n"
            "t = threading.Thread(target=main); t.start(); t.join()",
            "right",
        ),
        ("def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20_000) - 19_992)", "right"),
        ("print(9)", "wrong"),
        ("print(", "wrong"),
    ],
)
def test_programs_read_and_write(programs: CodeGrader, code: str, grade: str) -> None:
    row = question(public_test_cases=json.dumps(STDIN), private_test_cases=packed(json.dumps([])))
    assert programs.grade(row, answered(code)).grade == grade


def test_a_method_is_called(programs: CodeGrader) -> None:
    row = question(
        public_test_cases=json.dumps(FUNCTIONAL),
        private_test_cases=packed(json.dumps(FUNCTIONAL * 2)),
        metadata='{"func_name": "add"}',
    )
    good = "class Solution:\n  def add(self, a: List[int], b): print('hm'); return a + [b]"
    verdict = programs.grade(row, answered(good))
    assert (verdict.grade, verdict.note) == ("right", "3 tests")
    verdict = programs.grade(row, answered(good.replace("[b]", "[]")))
    assert (verdict.grade, verdict.note) == ("wrong", "test 1 of 3: wrong result")
    assert programs.grade(row, "no program").grade == "unanswered"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os\nwhile True: os.fork()", "Resource temporarily unavailable"),
        ("import subprocess\nsubprocess.run(['sleep', '77777'])", "Resource temporarily"),
        ("x = [0] * 10**10", "MemoryError"),
        ("while True: print('x' * 10**6)", "File too large"),
        ("[open(str(i), 'w') for i in range(99)]", "Too many open files"),
        ("open('/etc/r2r-glimp', 'w')", "denied"),
        ("import os\nassert not set(os.environ) - {'PATH','LANG','OPENBLAS_NUM_THREADS',"
         "'LC_CTYPE'}; assert os.listdir('.') == ['program.py']; 1/0", "ZeroDivisionError"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    ],
)  # fmt: skip
def test_what_programs_may_not(programs: CodeGrader, code: str, why: str) -> None:
    assert why in str(programs.run(code, CodeTest("", "")))


def test_a_program_that_never_ends_is_killed() -> None:
    memory = 2_012_345_678  # stands in the process's arguments
    grader = CodeGrader(timeout_s=0.5, workers=1, memory=memory)
    code = "import time\ntime.sleep(77777)"
    assert grader.run(code, CodeTest("", "")) == "took longer than 0.5 s"
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(memory) not in listed


def test_outputs_are_compared_by_line_and_value() -> None:
    assert same_output(" 1 2\n3.0\n\n", "1  2\n3")
    assert not same_output("1\n2", "1 2") and not same_output("a", "b")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of a file ran",))


@pytest.mark.parametrize("value", [Evil(), [1], "a" * 3 + "b", b"bytes", ("x", "y"), {"a": "b"}, 7])
def test_only_a_plain_string_is_unpacked(value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(value, str):
        for protocol in range(1, pickle.HIGHEST_PROTOCOL + 1):
            assert pickled_string(pickle.dumps(value, protocol)) == value
        return
    row = question(private_test_cases=packed(value))
    with pytest.raises(DataError, match="x:1: key 'private_test_cases' is neither"):
        read_tests(row)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"public_test_cases": "[]"}, "no tests"),
        ({"public_test_cases": '{"a": 1}'}, "not a list of tests"),
        ({"private_test_cases": "?!"}, "neither JSON nor packed"),
        ({"public_test_cases": json.dumps(FUNCTIONAL)}, "metadata.func_name"),
        ({"public_test_cases": json.dumps(FUNCTIONAL), "metadata": '{"func_name": "a b"}'}, "name"),
        ({"public_test_cases": '[{"input": "1"}]'}, "lacks a text"),
        ({"public_test_cases": json.dumps(STDIN), "metadata": "{"}, "not JSON"),
    ],
)
def test_broken_tests_are_named(kept: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"x:1: .*{message}"):
        read_tests(question(**kept))


def test_a_program_is_the_last_fenced_one() -> None:
    assert final_code("```py\na\n```\n```\nb\n```\n") == "b\n"
    assert final_code("```py\nopen") is None and final_code("```\n\n```") is None
