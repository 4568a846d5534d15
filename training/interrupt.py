"""SIGTERM and SIGINT as an exception that no one mistakes for a failure."""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal ended the run. Not an Exception: nothing that handles failures may swallow it.

    Attributes:
        exit_code: 130 or 143.
        resumable: a checkpoint of the very point where it stopped was saved.
    """

    def __init__(self, signum: int, resumable: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum
        self.resumable = resumable


class SignalWatch:
    """While entered: raises `Interrupted` at once, or remembers the first signal while `deferring`.

    Attributes:
        deferring: someone looks at `signum` at times when stopping is convenient.
        signum: the signal that came meanwhile.
    """

    def __init__(self) -> None:
        self.deferring = False
        self.signum: int | None = None
        self._before: list[Any] = []

    def __enter__(self) -> "SignalWatch":
        self._before = [signal.getsignal(signum) for signum in SIGNALS]
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(signum, handler)

    def install(self) -> None:
        """Take the signals (back, if another handler took them); in the main thread."""
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None or not self.deferring:
            raise Interrupted(signum)
        self.signum = signum
