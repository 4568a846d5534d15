"""What a client may cost before its request is looked at: keys, headers, bodies, slots.

client ──▶ Guard: header size, key, content type, body size and time ──▶ app ──▶ Slots
"""

import asyncio
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r2r_glimp.serve.auth import Keys
from r2r_glimp.serve.errors import Refusal, error_response
from r2r_glimp.serve.metrics import Metrics

MAX_HEADERS = 16 * 2**10
BODY_TIMEOUT_S = 30.0
LINGER_S = 1.0
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the guard lets through.

    Attributes:
        keys: who is let in.
        max_body: bytes of a body.
        body_timeout_s: seconds a body may take to arrive.
        open_paths: paths that need no key.
    """

    keys: Keys
    max_body: int = 4 * 2**20
    body_timeout_s: float = BODY_TIMEOUT_S
    open_paths: frozenset[str] = OPEN_PATHS


class Guard:
    """ASGI middleware: refuses what is too large, too slow or not allowed in, and reads the body
    whole, so that what comes after only ever waits for the client to leave."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12).encode()
        scope["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                if message["status"] >= 400:
                    self.metrics.count_error(message["status"])
            await send(message)

        unfinished = True  # the body; nothing more comes after its end

        async def read() -> Message:
            nonlocal unfinished
            message = await receive()
            unfinished = message.get("more_body", False)
            return message

        async def send_and_linger(message: Message) -> None:
            # A connection that is closed with something unread is reset, and what the client has
            # not read yet is lost: so the answer goes out, then some of the rest is read.
            if message["type"] == "http.response.body":
                await send_with_id({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S):
                        while unfinished:
                            await read()
                message = {"type": "http.response.body"}
            await send_with_id(message)

        try:
            self._check_headers(scope, headers)
            body = await self._read(headers, read)
        except Refusal as refusal:
            response = error_response(refusal)
            response.headers["Connection"] = "close"
            await response(scope, receive, send_and_linger)
            return
        except _GoneError:
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send_with_id)

    def _check_headers(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope["raw_path"] or b"") + len(scope["query_string"])
        if size > MAX_HEADERS:
            raise Refusal(431, f"the headers have {size:,} bytes, at most {MAX_HEADERS:,} are read")
        if scope["path"] not in self.limits.open_paths:
            if not self.limits.keys.admit(headers.get(b"authorization", b"")):
                message = "no valid API key: send the header `Authorization: Bearer KEY`"
                raise Refusal(401, message, code="invalid_api_key")
        if scope["method"] == "POST":
            # Browsers send other types to foreign servers without asking; JSON they do not.
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refusal(415, "the body must be JSON: send `Content-Type: application/json`")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.limits.max_body:
            self._refuse_body()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.limits.max_body:
                        self._refuse_body()
                    more = message.get("more_body", False)
        except TimeoutError:
            limit = self.limits.body_timeout_s
            raise Refusal(408, f"the body did not arrive within {limit:g} s") from None
        return b"".join(chunks)

    def _refuse_body(self) -> None:
        raise Refusal(413, f"the body has more than {self.limits.max_body:,} bytes")


class _GoneError(Exception):
    """The client left."""


class Slots:
    """How many completions may be under way or waiting at once; one more is refused at once.

    Args:
        size: their number.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0

    def take(self, count: int) -> None:
        """Hold slots for a request; `give` them back.

        Raises:
            Refusal: 429 if they are not free now, 400 if they never could be.
        """
        if count > self.size:
            raise Refusal(
                400, f"{count} completions in one request, this server holds {self.size}", param="n"
            )
        if self.taken + count > self.size:
            raise Refusal(
                429,
                f"the queue is full ({self.taken} completions): try again later",
                code="queue_full",
                retry_after=1,
            )
        self.taken += count

    def give(self, count: int) -> None:
        self.taken -= count
