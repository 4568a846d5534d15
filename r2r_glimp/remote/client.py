"""Client: many requests at once over one pool of connections, from a thread of its own.

submit ──▶ future      try, wait, try again; a time-out ends each try, the breaker ends them all
"""

import asyncio
import atexit
import random
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from r2r_glimp.core import EngineError, UsageError
from r2r_glimp.remote.api import Ask, BrokenReply, Completions, Reply, SGLang, Text, parse_json
from r2r_glimp.remote.breaker import Breaker
from r2r_glimp.remote.spec import RemoteSpec

T = TypeVar("T")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0
_AGAIN = (408, 409, 425, 429)  # and every 5xx
_MAX_REPLY = 64 * 2**20


class RemoteError(EngineError):
    """A server did not do what it was asked to; one line says why."""


class Refused(RemoteError):
    """A server's answer that no second try would change; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Again(Exception):
    """A try that failed in a way that may pass."""

    def __init__(self, problem: str, after_s: float | None = None) -> None:
        super().__init__(problem)
        self.after_s = after_s


class Client:
    """Asks one server.

    Args:
        spec: where it is.

    Raises:
        UsageError: aiohttp is not installed, or the key's variable is not set.
    """

    def __init__(self, spec: RemoteSpec) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sessions: list[Any] = []  # one at most; the thread holds it too
        self._slots: asyncio.Semaphore
        try:
            import aiohttp
        except ImportError:
            raise UsageError(
                "a model behind a URL needs aiohttp, which is not installed: "
                "pip install 'r2r_glimp[remote]'"
            ) from None
        self._aiohttp = aiohttp
        self.spec = spec
        key = spec.key()
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self.breaker = Breaker()
        self.num_tries = 0
        _OPEN.add(self)

    def submit(
        self,
        ask: Ask,
        dialect: Completions | SGLang | Text,
        model: str,
        vocab_size: int,
        *,
        once_only: bool = False,
    ) -> Future[Reply]:
        """Have something written; a failure is a RemoteError of one line.

        Args:
            vocab_size: ids from there on are none.
            once_only: only to see whether the server understands: nothing is tried again.
        """
        url, body = dialect.path(self.spec.url), dialect.body(ask, model)

        async def once() -> Reply:
            if isinstance(dialect, Text):
                return await self._stream(url, body, ask, dialect)
            reply = parse_json(await self._exchange("POST", url, body))
            return dialect.parse(reply, ask, vocab_size)

        return self._start(self._keep_trying(once, once_only=once_only))

    def get(self, url: str) -> Any:
        """JSON of a GET; waits for it, with retries.

        Raises:
            RemoteError: it is not to be had.
        """
        return self._start(self._persist("GET", url, None)).result()

    def post(self, url: str, body: Any) -> Any:
        """JSON of a POST; waits for it, with retries.

        Raises:
            RemoteError: it is not to be had.
        """
        return self._start(self._persist("POST", url, body)).result()

    def close(self) -> None:
        """Drop the connections; what is under way is cancelled."""
        if (end := self._end()) is not None:
            end.result(5)

    def __del__(self) -> None:
        self._end()  # without waiting: this may be the loop's own thread

    def _end(self) -> Future[None] | None:
        with self._lock:
            loop, self._loop = self._loop, None
            sessions, self._sessions = self._sessions, []
        if loop is None or loop.is_closed():
            return None
        return asyncio.run_coroutine_threadsafe(_shut(sessions), loop)

    # ------------------------------------------------------------------ the thread

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon, so that an interrupted run ends at once and not with its last request.
                threading.Thread(
                    target=_run, args=(self._loop, self._sessions), daemon=True
                ).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _open_session(self) -> Any:
        if not self._sessions:
            self._slots = asyncio.Semaphore(self.spec.concurrency)  # waiting for one is no delay
            aiohttp = self._aiohttp
            connector = aiohttp.TCPConnector(limit=0)
            session = aiohttp.ClientSession(
                connector=connector,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=self.spec.timeout_s),
                read_bufsize=2**20,
            )
            self._sessions.append(session)
        return self._sessions[0]

    async def _persist(self, method: str, url: str, body: Any) -> Any:
        async def once() -> Any:
            return parse_json(await self._exchange(method, url, body))

        return await self._keep_trying(once)

    async def _keep_trying(self, once: Callable[[], Awaitable[T]], *, once_only: bool = False) -> T:
        """The result of a try; RemoteError when enough have failed."""
        num_tries = 1 if once_only else self.spec.retries + 1
        wait_s = self.breaker.wait_s()
        if wait_s is not None:
            raise RemoteError(
                f"{self.spec.url} did not answer the last requests and is left alone for "
                f"{wait_s:.0f} s more"
            )
        problem = ""
        try:
            for attempt in range(num_tries):
                try:
                    self.num_tries += 1
                    result = await once()
                    self.breaker.succeed()
                    return result
                except _Again as again:
                    problem, after_s = str(again), again.after_s
                except BrokenReply as broken:
                    problem, after_s = str(broken), None
                except Refused:
                    self.breaker.succeed()  # it is there, and says no
                    raise
                if attempt < num_tries - 1:
                    wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
                    wait_s *= random.uniform(0.75, 1.25)  # not all at once again
                    await asyncio.sleep(min(LONGEST_WAIT_S, after_s) if after_s else wait_s)
        except asyncio.CancelledError:
            self.breaker.leave()
            raise
        if once_only:
            self.breaker.leave()
        else:
            self.breaker.fail()
        tries = f"{num_tries} tries" if num_tries > 1 else "1 try"
        raise RemoteError(f"{self.spec.url} cannot be used: {problem} ({tries})")

    async def _exchange(self, method: str, url: str, body: Any) -> bytes:
        """One request, its whole answer."""
        return await self._request(method, url, body, lambda response: _read_all(response))

    async def _stream(self, url: str, body: Any, ask: Ask, dialect: Text) -> Reply:
        """One request, its stream up to where it is enough; then the connection is closed."""

        async def read(response: Any) -> Reply:
            reply = Reply()
            async for line in response.content:
                if dialect.read(line.decode("utf-8", "replace").rstrip("\r\n"), ask, reply):
                    return reply
            raise _Again("the stream broke off")

        return await self._request("POST", url, body, read)

    async def _request(self, method: str, url: str, body: Any, read: Any) -> Any:
        late = f"no answer within {self.spec.timeout_s:g} s"
        try:
            session = self._open_session()
            async with (
                self._slots,
                session.request(method, url, json=body, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    await self._refuse(response)
                return await read(response)
        except TimeoutError:
            raise _Again(late) from None
        except (self._aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, BrokenReply):
                raise
            raise _Again(_reason(error)) from None

    async def _refuse(self, response: Any) -> None:
        text = " ".join((await response.content.read(2000)).decode("utf-8", "replace").split())
        problem = f"HTTP {response.status} {text[:200] or response.reason}"
        if response.status in _AGAIN or response.status >= 500:
            raise _Again(problem, _retry_after(response))
        raise Refused(f"{self.spec.url} refuses: {problem}", response.status)


def _run(loop: asyncio.AbstractEventLoop, sessions: list[Any]) -> None:
    """The thread. It holds the session, so that a forgotten client can still close it."""
    loop.run_forever()
    loop.close()


async def _shut(sessions: list[Any]) -> None:
    """Cancel what runs in this loop, drop the connections, and end the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for session in sessions:
        await session.close()
    loop = asyncio.get_running_loop()
    loop.call_later(0.01, loop.stop)  # after this has been told


_OPEN: "weakref.WeakSet[Client]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the interpreter takes away what connections need to close."""
    for client in list(_OPEN):
        client.close()


async def _read_all(response: Any) -> bytes:
    data: bytes = await response.content.read(_MAX_REPLY)
    while not response.content.at_eof():
        more = await response.content.read(_MAX_REPLY)
        data += more
        if len(data) > _MAX_REPLY:
            raise BrokenReply(f"its answer is longer than {_MAX_REPLY:,} bytes")
    return data


def _reason(error: BaseException) -> str:
    """`Connection refused` rather than where in whose library."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    os_error = getattr(error, "os_error", None)
    if os_error is not None and os_error.strerror:
        text = os_error.strerror
    return " ".join(str(text).split())[:200]


def _retry_after(response: Any) -> float | None:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:
        return None
