"""How long a forward pass takes, by the number of its new tokens: stated, or measured here."""

import bisect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import Model
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import ModelRunner, Rows


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a pass: linear between points of (tokens, seconds), and on beyond them."""

    points: tuple[tuple[int, float], ...]

    @classmethod
    def stated(cls, step_ms: float, token_us: float) -> "StepTime":
        """A pass of one token, and what each further one adds."""
        first, more = step_ms / 1e3, token_us / 1e6
        return cls(((1, first), (2, first + more)))

    def seconds(self, tokens: int) -> float:
        """Seconds of a pass over so many new tokens."""
        if len(self.points) == 1:
            return self.points[0][1]
        at = bisect.bisect_right([count for count, _ in self.points], tokens)
        at = min(max(at, 1), len(self.points) - 1)
        (left, low), (right, high) = self.points[at - 1], self.points[at]
        return low + (tokens - left) * (high - low) / (right - left)


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of both models' passes, and what the engine itself takes beside each."""

    passes: tuple[StepTime, StepTime]
    host_s: float


def measure(engine: Engine, run: Callable[[], object]) -> Measured:
    """What passes take while something runs: in their places between other work, which leaves
    little in the caches."""
    found: dict[Model, dict[int, list[float]]] = {m: defaultdict(list) for m in Model}
    with ExitStack() as undo:
        for model in Model:
            runner = engine.runners[model]
            if "forward" not in vars(runner):  # the same one may play both
                runner.forward = _recorded(runner, found[model])  # type: ignore[assignment]
                undo.callback(delattr, runner, "forward")
        started = time.perf_counter()
        run()
        elapsed = time.perf_counter() - started
    slm, llm = (
        StepTime(tuple((tokens, statistics.mean(took)) for tokens, took in sorted(one.items())))
        for one in (found[Model.SLM], found[Model.LLM] or found[Model.SLM])
    )
    every = [took for one in found.values() for group in one.values() for took in group]
    return Measured((slm, llm), (elapsed - sum(every)) / len(every))


def _recorded(
    runner: ModelRunner, found: dict[int, list[float]]
) -> Callable[[list[Row], list[int]], Rows]:
    forward = runner.forward

    def recorded(rows: list[Row], wanted: list[int]) -> Rows:
        started = time.perf_counter()
        out = forward(rows, wanted)
        if len(out.logits_RV):
            out.logits_RV[0, 0].item()  # which waits for the device
        found[sum(len(row.tokens) for row in rows)].append(time.perf_counter() - started)
        return out

    return recorded
