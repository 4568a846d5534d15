"""A server in a process of its own, for measurements and tests."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from r2r_glimp.core import EngineError

_URL = re.compile(r"http://\S+:(\d+)/v1")


@dataclass(slots=True)
class ServerProcess:
    """A running server: its process, its port, and what it said."""

    process: subprocess.Popen[str]
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self, timeout_s: float = 60.0) -> int:
        """Ask it to end, and wait; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def running_server(
    *args: str, environment: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Start `r2r-glimp serve` on a free port, and stop it at the end.

    Args:
        args: options of the verb.
        environment: variables beside the present ones.

    Raises:
        EngineError: it ended before it served.
    """
    server = ServerProcess(_spawn(["--port", "0", *args], environment or {}))
    serving = threading.Event()

    def read() -> None:
        assert server.process.stderr is not None
        for line in server.process.stderr:
            server.lines.append(line.rstrip())
            if "serving: " in line and (match := _URL.search(line)):
                server.port = int(match[1])
                serving.set()
        serving.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        serving.wait()
        if not server.port:
            raise EngineError(f"the server did not start: {' '.join(server.lines[-3:])}")
        yield server
    finally:
        server.stop()
        reader.join(5)


def _spawn(args: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "r2r_glimp", "serve", *args],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
