"""A simulated server: a remote LLM on a virtual clock, which batches whatever waits when it is
free."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from transformers import PreTrainedTokenizerFast

from r2r_glimp.bench.steptime import StepTime
from r2r_glimp.core import Model
from r2r_glimp.models.remote import RemoteModel
from r2r_glimp.remote.api import DIALECTS, Ask, Reply
from r2r_glimp.remote.spec import RemoteSpec

_MOMENT = 1e-9


class Clock:
    """Virtual seconds, and of them how long each model has worked here."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = [0.0, 0.0]
        self.num_passes = 0
        self.watchers: list[Callable[[float], None]] = []

    def work(self, model: Model, seconds: float) -> None:
        """A model works for so long, and everybody here waits for it."""
        self.now += seconds
        self.busy[model] += seconds
        self.num_passes += 1
        for watch in self.watchers:
            watch(self.now)


class _Open:
    """A request under way: tokens it has still to write, and those its next pass reads."""

    def __init__(self, ask: Ask, num_new: int, arrived: float) -> None:
        self.arrived = arrived
        self.future: Future[Reply] = Future()
        self.future.set_running_or_notify_cancel()
        self.num_left, self.num_new, self.written = ask.max_tokens, num_new, 0


class ServedLLM:
    """Stands where the HTTP client stands.

    Args:
        clock: of the engine that asks.
        step_time: of the LLM's passes.
        token: what it writes.
    """

    def __init__(self, clock: Clock, step_time: StepTime, token: int) -> None:
        self.clock, self.step_time, self.token = clock, step_time, token
        self._waiting: list[_Open] = []
        self._batch: list[_Open] = []
        self._ends = 0.0  # when the pass under way does
        clock.watchers.append(self._run_until)
        self._known: dict[int, int] = {}  # by the first tokens of a prompt: what it has read of it

    def model(self, tokenizer: PreTrainedTokenizerFast, context_length: int) -> RemoteModel:
        """The model, for a pair."""
        spec = RemoteSpec(url="http://simulated/v1")
        dialect, client = DIALECTS["completions"], self
        return RemoteModel(spec, client, "llm", tokenizer, dialect, context_length)  # type: ignore[arg-type]

    def submit(self, ask: Ask, *_: Any, **__: Any) -> "Future[Reply]":
        """Queue a request; its prefix is remembered from the last one of the same text."""
        key = hash(tuple(ask.tokens[:8]))
        num_new = max(1, len(ask.tokens) - self._known.get(key, 0))
        self._known[key] = len(ask.tokens)
        opened = _Open(ask, num_new, self.clock.now)
        self._waiting.append(opened)
        return opened.future

    def wait(self) -> None:
        """Let time pass until an answer is there."""
        open_ones = self._waiting + self._batch
        while not any(one.future.done() for one in open_ones):
            self._run_until(self.clock.now + _MOMENT)
            self.clock.now = max(self.clock.now, self._ends)
            self._run_until(self.clock.now)

    def _run_until(self, now: float) -> None:
        """Passes that begin before `now` and end by then."""
        while True:
            if not self._batch and not self._begin(now):
                return
            if self._ends > now:
                return
            for one in self._batch:
                one.written += 1
                one.num_left -= 1
                one.num_new = 1
                if not one.num_left:
                    one.future.set_result(Reply([self.token] * one.written))
            self._waiting = [one for one in self._batch if one.num_left] + self._waiting
            self._batch = []

    def _begin(self, now: float) -> bool:
        """Start a pass over all that wait; whether one was to be started before `now`."""
        if not self._waiting:
            return False
        start = max(self._ends, min(one.arrived for one in self._waiting))
        if start >= now:
            return False  # who asks at the same moment belongs to it
        self._batch = [one for one in self._waiting if one.arrived <= start]
        self._waiting = [one for one in self._waiting if one.arrived > start]
        took = self.step_time.seconds(sum(one.num_new for one in self._batch))
        self._ends = start + took
        self.clock.busy[Model.LLM] += took
        return True
