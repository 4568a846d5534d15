"""The worker: the one thread that owns the engine, and how the event loop talks to it.

    event loop                                    engine thread
    submit(ticket) ── inbox ──────────────▶  add_request, abort │ step │ step │ …
    async for batch in ticket ◀── call_soon_threadsafe, for all tickets together

An abort is taken up before the next tick. What several ticks bring within `FLUSH_S` is handed over
at once: waking the event loop costs more than a tick of a small model. Whatever leaves a tick as an
exception leaves the engine in an unknown state: the worker is dead then, and says so.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal

from r2r_glimp.core import (
    EngineError,
    Event,
    FinishEvent,
    R2RGlimpError,
    RequestOutput,
    RoutingParams,
    SamplingParams,
    TokenEvent,
)
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prompts import EncodedPrompt
from r2r_glimp.routing.drift import DriftMonitor
from r2r_glimp.serve.errors import Refusal
from r2r_glimp.serve.metrics import Metrics

log = logging.getLogger("r2r_glimp.serve")

WATCH_EVERY_S = 0.25
FLUSH_S = 0.02  # about a frame of a screen
Batch = list[tuple[int, Event]]  # events, each with the index of its choice
Health = Literal["ok", "draining", "stalled", "dead"]


@dataclass(slots=True, eq=False)
class Ticket:
    """One HTTP request in the engine: some prompts, `sampling.n` completions of each.

    Choice `i * n + k` is completion k of prompt i. Only the event loop touches `batch`, `ready` and
    `error`; only the engine thread touches `held` and what follows it.
    """

    request_id: str
    prompts: list[EncodedPrompt]
    sampling: SamplingParams
    routing: RoutingParams
    stream: bool
    monitor: DriftMonitor | None = None
    submitted: float = field(default_factory=time.monotonic)
    batch: Batch = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    finished: bool = False
    held: Batch = field(default_factory=list)
    num_open: int = 0
    last_token: dict[int, float] = field(default_factory=dict)  # when, by choice

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n

    async def take(self, timeout_s: float = 3600.0) -> Batch:
        """What happened since the last call; waits for something, and gives nothing at a timeout.

        Raises:
            R2RGlimpError: the request failed, whatever was still to come.
        """
        if not self.ready.is_set():
            # Cheaper than asyncio.timeout, and this runs for nearly every token of every stream.
            alarm = asyncio.get_running_loop().call_later(timeout_s, self.ready.set)
            await self.ready.wait()
            alarm.cancel()
        self.ready.clear()
        if self.error is not None:
            self.ready.set()
            raise self.error
        batch, self.batch = self.batch, []
        return batch

    async def __aiter__(self) -> AsyncIterator[Batch]:
        open_choices = self.num_choices
        while open_choices:
            batch = await self.take()
            open_choices -= sum(isinstance(event, FinishEvent) for _, event in batch)
            yield batch

    def deliver(self, batch: Batch) -> None:
        self.batch += batch
        self.ready.set()

    def fail(self, error: Exception) -> None:
        """End it by an exception; the first one counts."""
        if self.error is None:
            self.error = error
            self.ready.set()


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        engine: nobody else may call it once the worker runs, save for `encode`.
        metrics: what is counted.
        stall_s: seconds a tick may take before the engine counts as stalled.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, stall_s: float = 120.0) -> None:
        self.engine = engine
        self.metrics = metrics
        self.stall_s = stall_s
        self.draining = False
        self.open: set[Ticket] = set()  # the event loop's view
        self._death: str | None = None
        self._tick_started: float | None = None
        self._stall_seen = False
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._tickets: dict[str, tuple[Ticket, int]] = {}  # by engine request: and its first choice
        self._unread: dict[Ticket, None] = {}  # tickets that hold events for their readers
        self._flushed = 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watching: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ the event loop's side

    def start(self) -> None:
        """Start the thread and its watchdog; call in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.leave_thread()
        self._watching = self._loop.create_task(self._watch())
        self._thread.start()

    async def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread after its tick; requests that are left fail."""
        self._inbox.put(self._stop)
        if self._watching is not None:
            self._watching.cancel()
        self.fail_all(Refusal(503, "the server is shutting down", retry_after=5))
        await asyncio.to_thread(self._thread.join, timeout_s)

    @property
    def health(self) -> Health:
        """What to tell a load balancer."""
        if self._death is not None:
            return "dead"
        if self._is_stalled:
            return "stalled"
        return "draining" if self.draining else "ok"

    def check(self) -> None:
        """Raises Refusal (503) if no request can be taken."""
        health = self.health
        if health == "dead":
            raise Refusal(503, f"the engine is dead ({self._death}): the server must be restarted")
        if health == "stalled":
            raise Refusal(503, "the engine is stalled", retry_after=10)
        if health == "draining":
            raise Refusal(503, "the server is shutting down", retry_after=5)

    def submit(self, ticket: Ticket) -> None:
        """Hand a request to the engine. End it by `release`, whatever becomes of it.

        Raises:
            Refusal: the engine takes none.
        """
        self.check()
        self.open.add(ticket)
        self._inbox.put(lambda: self._add(ticket))

    def release(self, ticket: Ticket) -> None:
        """The reader of a ticket is done: what still runs of it is aborted within a tick."""
        self.open.discard(ticket)
        if not ticket.finished:
            self._inbox.put(lambda: self._abort(ticket))

    def fail_all(self, error: Exception) -> None:
        """Fail every open request; their readers release them."""
        for ticket in list(self.open):
            ticket.fail(error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            stalled = self._is_stalled
            if stalled and not self._stall_seen:
                log.error("the engine is stalled: a tick takes longer than %g s", self.stall_s)
                self.fail_all(Refusal(503, "the engine is stalled", retry_after=10))
            elif self._stall_seen and not stalled:
                log.warning("the engine goes on after a stall")
            self._stall_seen = stalled

    @property
    def _is_stalled(self) -> bool:
        started = self._tick_started
        return started is not None and time.monotonic() - started > self.stall_s

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take_commands()
                if self.engine.has_work and not self._stopped:
                    self._tick()
        except Exception as error:
            log.exception("the engine died")
            self._death = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            death = EngineError(f"the engine died: {self._death}")
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.fail_all, death)

    def _take_commands(self) -> None:
        """Take what the inbox holds; wait for something where there is nothing to compute."""
        try:
            if not self.engine.has_work:
                self.engine.check_integrity()
                self.metrics.observe_engine(self.engine)
                self._inbox.get()()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _stop(self) -> None:
        self._stopped = True

    def _add(self, ticket: Ticket) -> None:
        if ticket not in self.open:
            return  # its client left while it was in the inbox
        ids: list[str] = []
        try:
            for i, prompt in enumerate(ticket.prompts):
                name = f"{ticket.request_id}-{i}"
                self._tickets[name] = (ticket, i * ticket.sampling.n)
                ids.append(name)
                self.engine.add_request(prompt, ticket.sampling, ticket.routing, request_id=name)
        except Exception as error:
            for name in ids:
                del self._tickets[name]
                self.engine.abort(name)
            if not isinstance(error, R2RGlimpError):
                log.exception("%s could not be added", ticket.request_id)
                error = EngineError(f"the request could not be added: {type(error).__name__}")
            self._post(lambda error=error: ticket.fail(error))  # type: ignore[misc]
            return
        ticket.num_open = ticket.num_choices

    def _abort(self, ticket: Ticket) -> None:
        for i in range(len(ticket.prompts)):
            name = f"{ticket.request_id}-{i}"
            if self._tickets.pop(name, None) is not None:
                self.engine.abort(name)
                if ticket.monitor is not None:
                    ticket.monitor.forget(name)
        if ticket.num_open:
            self.metrics.count_aborted(ticket.num_open)

    def _tick(self) -> None:
        self._tick_started = time.monotonic()
        events = self.engine.step()
        now = time.monotonic()
        urgent = False
        for event in events:
            found = self._tickets.get(event.request_id)
            if found is None:
                continue  # aborted: nobody reads on
            ticket, first = found
            choice = first + event.index
            ticket.held.append((choice, event))
            if isinstance(event, TokenEvent):
                before = ticket.last_token.get(choice)
                urgent |= before is None
                self.metrics.count_token(event, now - ticket.submitted, before and now - before)
                ticket.last_token[choice] = now
                # Of several completions of a prompt the first one stands for it.
                if ticket.monitor is not None and event.score is not None and not event.index:
                    ticket.monitor.count(event.request_id, event.score)
            else:
                urgent = True
                self._count_end(ticket, event.output, now)
            if ticket.stream or ticket.finished:
                self._unread[ticket] = None
        self.metrics.observe_engine(self.engine)
        if self._unread and (urgent or now - self._flushed >= FLUSH_S):
            self._flush(now)
        self._tick_started = None

    def _count_end(self, ticket: Ticket, output: RequestOutput, now: float) -> None:
        """Take down that a choice ended, and with the last one its ticket."""
        ticket.num_open -= 1
        self.metrics.count_finished(output, now - ticket.submitted)
        if ticket.monitor is not None and not output.index:
            self._watch_drift(ticket.monitor, output)
        if not ticket.num_open:
            ticket.finished = True
            for i in range(len(ticket.prompts)):
                del self._tickets[f"{ticket.request_id}-{i}"]

    def _watch_drift(self, monitor: DriftMonitor, output: RequestOutput) -> None:
        if output.finish_reason == "error":
            monitor.forget(output.request_id)
            return
        if monitor.finish(output.request_id, output.stats.llm_share):
            log.warning("drift: %s", monitor.describe())
        self.metrics.observe_drift(monitor)

    def _flush(self, now: float) -> None:
        """Hand over what tickets hold."""
        ready = [(ticket, ticket.held) for ticket in self._unread]
        for ticket in self._unread:
            ticket.held = []
        self._unread.clear()
        self._flushed = now
        self._post(lambda: _deliver(ready))

    def _post(self, call: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: the server is gone
            self._stopped = True


def _deliver(ready: list[tuple[Ticket, Batch]]) -> None:
    for ticket, batch in ready:
        ticket.deliver(batch)
