"""How long a forward pass takes, by the number of its new tokens: stated, or measured here."""

import bisect
import statistics
from array import array
from dataclasses import dataclass

from r2r_glimp.attention.gather import Row
from r2r_glimp.bench.measure import seconds
from r2r_glimp.core import Model
from r2r_glimp.engine.engine import Engine

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a pass: linear between points of (tokens, seconds), and on after the last."""

    points: tuple[tuple[int, float], ...]

    @classmethod
    def stated(cls, step_ms: float, token_us: float) -> "StepTime":
        """A pass of one token, and what each further one adds."""
        first, more = step_ms / 1e3, token_us / 1e6
        return cls(((1, first), (2, first + more)))

    def seconds(self, tokens: int) -> float:
        """Seconds of a pass over so many new tokens."""
        at = bisect.bisect_right([count for count, _ in self.points], tokens)
        at = min(max(at, 1), len(self.points) - 1)
        (left, low), (right, high) = self.points[at - 1], self.points[at]
        return low + (tokens - left) * (high - low) / (right - left)


def measure_step_time(engine: Engine, model: Model, rows: int, context: int) -> StepTime:
    """The times of a model's passes in an idle engine, at 1 to `rows` rows and more tokens a row.

    Args:
        rows: sequences in the largest pass.
        context: tokens that each has before.
    """
    pool, _ = engine.kv.place(model)
    points = []
    per_row = 1
    counts = [2**i for i in range(20) if 2**i < rows]
    sizes = [(count, 1) for count in counts] + [(rows, 2**i) for i in range(5)]
    for num_rows, per_row in sizes:
        num_blocks = -(-(context + per_row) // 16)
        blocks = pool.allocate(num_rows * num_blocks)
        assert blocks is not None, "the engine is idle, and was made for as many requests"
        tables = [
            array("i", blocks[i * num_blocks : (i + 1) * num_blocks]) for i in range(num_rows)
        ]
        batch = [Row([1] * per_row, context, table) for table in tables]
        wanted = [1] * num_rows

        def once(model: Model, batch: list[Row] = batch, wanted: list[int] = wanted) -> None:
            rows = engine.runners[model].forward(batch, wanted)
            rows.logits_RV[0, 0].item()  # which waits for the device

        took = []
        for _ in range(_REPEATS):
            if model is Model.LLM:
                once(Model.SLM)  # as in a routed run, which leaves the LLM nothing in the caches
            took.append(seconds(lambda: once(model)))  # noqa: B023
        points.append((num_rows * per_row, statistics.median(took)))
        pool.free(blocks)
    return StepTime(tuple(sorted(points)))
