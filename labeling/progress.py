"""Progress on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_LOG_EVERY_S = 10.0


class Meter:
    """Counts questions and tokens, with their rates and the time left.

    Args:
        total: questions of the run.
        done: of them, finished before.
        stream: where to write; stderr.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.total = total
        self.before = self.done = done
        self.tokens = 0
        self.stream = stream or sys.stderr
        self._finished = (done, 0)  # questions and tokens of finished shards
        self._started = self._said = time.monotonic()

    def update(self, questions: int, tokens: int) -> None:
        """So much of the current shard is done."""
        self.done, self.tokens = self._finished[0] + questions, self._finished[1] + tokens
        self._show()

    def finish_shard(self) -> None:
        """What was counted so far is done for good."""
        self._finished = (self.done, self.tokens)

    def close(self) -> None:
        """Say where it ended."""
        print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """`37/100 questions, 4.10/s, 1,300 tokens/s, 15 s left`"""
        elapsed = max(1e-6, time.monotonic() - self._started)
        rate = (self.done - self.before) / elapsed
        left = f"{_duration((self.total - self.done) / rate)} left" if rate else "starting"
        if self.done == self.total:
            left = f"{_duration(elapsed)} in all"
        return (
            f"{self.done:,}/{self.total:,} questions, {rate:.2f}/s, "
            f"{self.tokens / elapsed:,.0f} tokens/s, {left}"
        )

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._said >= _LOG_EVERY_S:
            self._said = now
            print(self.line(), file=self.stream, flush=True)


class _Bar(Meter):
    """The same as a bar of `rich`."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__(total, done)
        columns = (BarColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(self.line(), total=total, completed=done)
        self._progress.start()

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done, description=self.line())

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._show()
        self._progress.stop()


@contextmanager
def meter(total: int, done: int) -> Iterator[Meter]:
    """A meter that fits where stderr goes."""
    shown = _Bar(total, done) if sys.stderr.isatty() else Meter(total, done)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep `datasets` from drawing bars of its own."""
    import datasets

    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
