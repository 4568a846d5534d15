"""Programs, run against tests: right is what passes all of them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path

from labeling.answers import final_code
from labeling.formats import Question
from r2r_glimp.core import EngineError, UsageError
from r2r_glimp.evaluation.grading.grader import Verdict
from r2r_glimp.evaluation.grading.livecodebench import CodeTest, read_tests

_SCRIPT = Path(__file__).with_name("code_runner.py")
_FILE_BYTES = 64 * 2**20
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}


class CodeGrader:
    """The last fenced program of a text, run in a limited process against a question's tests.

    Args:
        timeout_s: of one test.
        workers: programs that run at once.
        memory: bytes a program may use.

    Raises:
        UsageError: the process of a program could not be limited here.
    """

    def __init__(self, timeout_s: float, workers: int, memory: int = 2 * 2**30) -> None:
        self.timeout_s, self.workers, self.memory = timeout_s, workers, memory
        self._python = _find_python()

    def grade(self, question: Question, text: str) -> Verdict:
        program = final_code(text)
        if program is None:
            return Verdict("unanswered", None)
        tests = read_tests(question)
        for number, test in enumerate(tests, start=1):
            problem = self.run(program, test)
            if problem is not None:
                return Verdict("wrong", None, f"test {number} of {len(tests)}: {problem}")
        return Verdict("right", None, f"{len(tests)} tests")

    def close(self) -> None:
        pass

    def run(self, program: str, test: CodeTest) -> str | None:
        """What is wrong with a program's answer to one test; None if nothing is.

        Raises:
            EngineError: the process could not be limited.
        """
        with (
            tempfile.TemporaryDirectory(prefix="r2r-glimp-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as said,
            tempfile.TemporaryFile() as complaints,
        ):
            (Path(folder) / "program.py").write_text(program, encoding="utf-8")
            given.write(test.input.encode())
            given.seek(0)
            limits = {
                "function": test.function,
                "cpu_s": int(self.timeout_s) + 1,
                "memory": self.memory,
                "file_bytes": _FILE_BYTES,
            }
            process = subprocess.Popen(
                [self._python, "-I", str(_SCRIPT), json.dumps(limits)],
                stdin=given,
                stdout=said,
                stderr=complaints,
                cwd=folder,
                env=_ENVIRONMENT,
                start_new_session=True,
            )
            try:
                code = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if code is None:
                return f"took longer than {self.timeout_s:g} s"
            if code != 0:
                complaints.seek(0)
                return _why(code, complaints.read(_FILE_BYTES).decode(errors="replace"))
            if test.function is None:
                said.seek(0)
                answer = said.read(_FILE_BYTES).decode(errors="replace")
                return None if same_output(answer, test.output) else "wrong output"
            return _wrong_result(Path(folder) / "result.json", test.output)


def _find_python() -> str:
    """This Python; as root, one that `nobody` can read, since programs run as nobody."""
    if os.getuid() != 0 or _is_open(os.__file__):
        return sys.executable
    for python in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(python).exists() and _is_open(python):
            return python
    raise UsageError(
        f"programs do not run as root, and other users cannot read this Python ({os.__file__}): "
        "evaluate as an ordinary user, or install python3 for all"
    )


def _is_open(path: str) -> bool:
    """Whether every user can read a file."""
    file = Path(path).resolve()
    reachable = all(folder.stat().st_mode & 0o001 for folder in file.parents)
    return reachable and bool(file.stat().st_mode & 0o004)


def same_output(answer: str, wanted: str) -> bool:
    """Line by line equal, white space around lines apart; numbers by value."""
    ours, theirs = (
        [line.strip() for line in text.strip().splitlines()] for text in (answer, wanted)
    )
    return len(ours) == len(theirs) and all(
        a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _same_numbers(answer: str, wanted: str) -> bool:
    try:
        return [Decimal(x) for x in answer.split()] == [Decimal(x) for x in wanted.split()]
    except InvalidOperation:
        return False


def _wrong_result(path: Path, wanted: str) -> str | None:
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return "it gave no result"
    try:
        return None if result == json.loads(wanted) else "wrong result"
    except ValueError:
        return None if str(result) == wanted.strip() else "wrong result"


def _why(code: int, complaints: str) -> str:
    """The last line of a traceback, or the signal that ended the program."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = complaints.strip().rpartition("\n")[2][:200]
    if "code_runner.py" in complaints and "_restrict" in complaints:
        raise EngineError(f"a program's process cannot be limited ({last}): run as another user")
    return last or f"exit code {code}"
