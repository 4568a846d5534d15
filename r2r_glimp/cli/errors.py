"""From exceptions and signals to one line and an exit code; the only place that maps them.

0 done | 1 it failed | 2 it cannot be asked for | 130 Ctrl-C | 141 the reader is gone | 143 SIGTERM
"""

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from r2r_glimp.core import CheckpointError, DataError, EngineError, R2RGlimpError, UsageError

PROG = "r2r-glimp"
EXIT_CODES: dict[type[R2RGlimpError], int] = {
    UsageError: 2,
    DataError: 2,
    CheckpointError: 2,
    EngineError: 1,
}
_BROKEN_PIPE = 128 + signal.SIGPIPE


class Stopped(BaseException):
    """A signal asked the program to end; no Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def say(kind: str, message: str) -> None:
    """One line on stderr: `r2r-glimp: error: ...`."""
    print(f"{PROG}: {kind}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def describe(error: Exception) -> tuple[str, int]:
    """An exception's line and exit code."""
    for kind, code in EXIT_CODES.items():
        if isinstance(error, kind):
            return str(error), code
    if _is_out_of_memory(error):
        return (
            "out of memory: lower --kv_memory or --max_batch, or use --dtype bfloat16",
            1,
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    what = " ".join(str(error).split())[:200]
    return (
        f"internal error: {type(error).__name__}: {what} (run again with --debug to see where)",
        1,
    )


def run_guarded(run: Callable[[], int], *, debug: bool = False) -> int:
    """Call `run`; whatever ends it becomes an exit code, and one line on stderr where it failed.

    Args:
        run: a verb.
        debug: add tracebacks, and let the libraries talk.
    """
    try:
        with (
            _signals({signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _stop}),
            _talk(debug),
        ):
            try:
                code = run()
            except SystemExit as end:  # --help and --print_config
                code = end.code if isinstance(end.code, int) else 0
            sys.stdout.flush()
            return code
    except (KeyboardInterrupt, Stopped) as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        say("stopped", signal.Signals(signum).name)
        return 128 + signum
    except BrokenPipeError:
        _forget_stdout()
        return _BROKEN_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = describe(error)
        say("error", message)
        return code


class Interrupts:
    """While entered, a first Ctrl-C or SIGTERM only sets `signum`; a second ends the program."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._handling = _signals({signal.SIGINT: self._note, signal.SIGTERM: self._note})

    def __enter__(self) -> "Interrupts":
        self._handling.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._handling.__exit__(None, None, None)

    def check(self) -> None:
        """Raise what the noted signal asks for, if there was one."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise Stopped(signum)
        self.signum = signum


@contextmanager
def _signals(
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    """Handle signals so for a while; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = " ".join(super().format(record).split("\n", 1)[0].split())
        return f"{PROG}: {record.levelname.lower()}: {message}"


@contextmanager
def _talk(debug: bool) -> Iterator[None]:
    """Our warnings go to stderr, a line each; the libraries are silent unless debugging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    log = logging.getLogger("r2r_glimp")
    level = log.level
    log.setLevel(logging.INFO if debug else logging.WARNING)
    log.addHandler(handler)
    if not debug:
        # Read by the libraries when they are imported.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Imported by transformers where it is installed; it tells what it does not need.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and ("allocate memory" in text or "not enough memory" in text)
        )
    )


def _forget_stdout() -> None:
    """The reader is gone (`| head`): what Python still flushes at exit must not complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file
        pass
