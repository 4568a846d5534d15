"""Mathematical answers, compared in value by math-verify, in processes of their own.

Its own time limit needs signals, which only a process's main thread may use, and cannot stop a long
multiplication. So each comparison has a process that is killed when time is up:

    threads that grade ──a line of JSON──▶ math_worker.py ──"right" | "wrong" | "unparsable"──▶
"""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import LifoQueue

from labeling.answers import final_boxed
from labeling.formats import Question
from r2r_glimp.core import EngineError, UsageError
from r2r_glimp.evaluation.grading.grader import Verdict, same

_SCRIPT = Path(__file__).with_name("math_worker.py")
_START_S = 120.0  # sympy is slow to import, on a busy machine above all


class MathGrader:
    """The last boxed answer, compared in value with the known one.

    Args:
        timeout_s: of one comparison; what takes longer is undecided.
        workers: processes, each started when it is first needed.

    Raises:
        UsageError: math-verify is not installed.
    """

    def __init__(self, timeout_s: float, workers: int) -> None:
        if find_spec("math_verify") is None:
            raise UsageError("answers of kind math need math-verify: pip install 'r2r_glimp[eval]'")
        self.workers, self._timeout_s = workers, timeout_s
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(workers):
            self._idle.put(None)

    def grade(self, question: Question, text: str) -> Verdict:
        answer = final_boxed(text)
        if answer is None:
            return Verdict("unanswered", None)
        gold = str(question.answer)
        if same(answer, gold):
            return Verdict("right", answer)
        reply = self._ask({"gold": gold, "answer": answer})
        if reply in ("right", "wrong"):
            return Verdict("right" if reply == "right" else "wrong", answer)
        if reply == "unparsable":
            return Verdict("unanswered", answer, "the answer cannot be parsed")
        return Verdict("undecided", answer, reply)

    def close(self) -> None:
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.kill()

    def _ask(self, request: dict[str, str]) -> str:
        worker = self._idle.get()
        try:
            worker = worker or _Worker()
            try:
                return worker.ask(request, self._timeout_s)
            except TimeoutError:
                worker.kill()
                worker = None
                return f"math-verify took longer than {self._timeout_s:g} s"
            except EOFError:
                worker.kill()
                worker = None
                return "math-verify ran out of memory"
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that compares; raises EngineError if it cannot be started."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._read = b""
        try:
            ready = self._line(_START_S)
        except (TimeoutError, EOFError):
            ready = ""
        if ready != "ready":
            self.kill()
            raise EngineError("math-verify cannot be started: try `python -c 'import math_verify'`")

    def ask(self, request: dict[str, str], timeout_s: float) -> str:
        """One answer; raises TimeoutError, or EOFError if the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None
        return self._line(timeout_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(descriptor, 4096)
            if not chunk:
                raise EOFError
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()
