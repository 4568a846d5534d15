"""Answers that take a while: streams of server-sent events, and whole ones, both watched for the
client's leaving."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from r2r_glimp.serve.errors import error_body, to_refusal
from r2r_glimp.serve.replies import Kind, Reply
from r2r_glimp.serve.service import Job

KEEP_ALIVE_S = 10.0
T = TypeVar("T")


async def answer(request: Request, job: Job, kind: Kind) -> Response:
    """Answer a generation request, and close its job.

    Raises:
        R2RGlimpError: it failed before anything was sent.
    """
    if not job.body.stream:
        try:
            return await _unless_gone(request, lambda: _whole(job, kind))
        finally:
            job.close()
    try:
        # What goes wrong before the first token still gets a status of its own.
        return await _unless_gone(request, lambda: _stream(job, kind))
    except BaseException:
        job.close()
        raise


async def _whole(job: Job, kind: Kind) -> Response:
    batches = [batch async for batch in job.ticket]
    reply = Reply(job, kind).whole(entry for batch in batches for entry in batch)
    return Response(reply.model_dump_json(exclude_unset=True), media_type="application/json")


async def _stream(job: Job, kind: Kind) -> Response:
    first = await job.ticket.take(KEEP_ALIVE_S)  # in a long queue the client shall hear from us
    reply = Reply(job, kind)
    return EventStream(reply, reply.opening() + list(reply.chunks(first)))


class EventStream(StreamingResponse):
    """A job's events as chunks; closes the job at the end, or when the client leaves.

    Args:
        reply: what makes the chunks.
        first: those that are there already.
    """

    def __init__(self, reply: Reply, first: list[str]) -> None:
        self.job = reply.job
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_body(reply, first), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()


async def _body(reply: Reply, first: list[str]) -> AsyncIterator[str]:
    """What is sent: the chunks of several ticks in one piece where the client is slow."""
    yield "".join(map(_event, first))
    try:
        while not reply.finished:
            batch = await reply.job.ticket.take(KEEP_ALIVE_S)
            text = "".join(map(_event, reply.chunks(batch))) if batch else ": keep-alive\n\n"
            if text:
                yield text
    except Exception as error:
        yield _event(_error(error))
        return
    yield "".join(map(_event, [*reply.closing(), "[DONE]"]))


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _error(error: Exception) -> str:
    refusal = to_refusal(error)
    body = error_body(refusal)
    body["error"]["code"] = body["error"]["code"] or refusal.status
    return json.dumps(body)


async def _unless_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """The work's result; if the client leaves first, the work is cancelled.

    Raises:
        ClientGone: it left. Nobody reads the answer.
    """
    running = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientGoneError
    finally:
        for task in (running, gone):
            task.cancel()
        await asyncio.gather(running, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ClientGoneError(Exception):
    """The client left before its answer."""
