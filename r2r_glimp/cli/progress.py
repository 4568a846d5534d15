"""Progress on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOG_EVERY_S = 10.0


@contextmanager
def progress(
    label: str, total: int, done: int = 0, *, quiet: bool = False
) -> Iterator[Callable[[], None]]:
    """Gives what is to be called with each finished piece of work.

    Args:
        label: what is done.
        total: pieces in all.
        done: of them, finished before.
        quiet: show nothing.
    """
    if quiet:
        yield lambda: None
    elif sys.stderr.isatty():
        bar = make_bar(label, total, done)
        with bar:
            yield lambda: bar.advance(bar.task_ids[0])
    else:
        log = _Log(label, total, done)
        yield log.advance
        log.show()


def make_bar(label: str, total: int, done: int = 0) -> Any:
    """A bar of `rich`, not started yet."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
    bar.add_task(label, total=total, completed=done)
    return bar


class _Log:
    """Lines for a log."""

    def __init__(self, label: str, total: int, done: int) -> None:
        self.label, self.total, self.done = label, total, done
        self._before = done
        self._started = self._said = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        if time.monotonic() - self._said >= _LOG_EVERY_S:
            self._said = time.monotonic()
            self.show()

    def show(self) -> None:
        elapsed = time.monotonic() - self._started
        rate = (self.done - self._before) / max(elapsed, 1e-6)
        print(
            f"{self.label}: {self.done:,}/{self.total:,}, {rate:.1f}/s",
            file=sys.stderr,
            flush=True,
        )
