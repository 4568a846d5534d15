"""The server's process: its socket, and how it ends.

SIGTERM or Ctrl-C ─▶ /ready says 503, new requests are refused
                  ─▶ what runs may finish, for `drain_s` seconds; the rest fails with 503
                  ─▶ the socket closes, exit code 0          a second signal ends it at once
"""

import asyncio
import errno
import json
import logging
import resource
import signal
import socket
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from r2r_glimp.core import UsageError
from r2r_glimp.serve.errors import Refusal, error_body
from r2r_glimp.serve.worker import Worker

log = logging.getLogger("r2r_glimp.serve")

LINGER_S = 3  # for connections whose client does not read, once all requests are answered
MAX_HEAD = 256 * 2**10  # bytes of a request's head that are read at all
HEAD_TIMEOUT_S = 30.0  # for a connection's first head to arrive


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        UsageError: the address is taken, not ours, or not an address.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(2048)
        except BaseException:
            sock.close()
            raise
    except socket.gaierror:
        raise UsageError(f"--host {host!r} is no address of a machine") from None
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            why = "is taken, perhaps by another server: stop it, or choose another --port"
        else:
            why = f"cannot be listened on: {getattr(error, 'strerror', None) or error}"
        raise UsageError(f"{host} port {port} {why}") from None
    sock.set_inheritable(False)
    return sock


def allow_many_files() -> None:
    """Every connection is a file; take as many as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connection(H11Protocol):
    """A connection that is closed where no request comes, and whose garbage is answered in
    OpenAI's form too."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._alarm = self.loop.call_later(HEAD_TIMEOUT_S, self._close_unused)

    def connection_lost(self, exc: Exception | None) -> None:
        self._alarm.cancel()
        super().connection_lost(exc)

    def _close_unused(self) -> None:
        if self.cycle is None:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_body(Refusal(400, msg))).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))),
                   ("Connection", "close")]  # fmt: skip
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, with an end in good order.

    Args:
        app: the application.
        worker: what drains.
        drain_s: seconds that requests have to finish after the signal.
    """

    def __init__(self, app: FastAPI, worker: Worker, *, drain_s: float) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LINGER_S,
            h11_max_incomplete_event_size=MAX_HEAD,
        )
        super().__init__(config)
        self.worker = worker
        self.drain_s = drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the process as signals do."""
        if self.worker.draining or self._loop is None:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
            return
        self.worker.draining = True
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        assert self._loop is not None
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        worker = self.worker
        log.warning("shutting down: %d requests may finish", len(worker.open))
        deadline = asyncio.get_running_loop().time() + self.drain_s
        while worker.open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if worker.open:
            log.warning("%d requests were not finished", len(worker.open))
            worker.fail_all(Refusal(503, "the server is shutting down", retry_after=5))
        self.should_exit = True
