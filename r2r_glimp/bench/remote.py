"""What a deferral over HTTP takes besides the LLM's own time, with many sequences at once, and how
much of the waiting is filled with other sequences' work.

The SLM runs here; the LLM is a stand-in behind real HTTP, in a process of its own, that takes a
given time for a token: what a deferral takes above that is ours.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from r2r_glimp.bench.measure import Sample
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.route import write
from r2r_glimp.bench.setting import Setting
from r2r_glimp.bench.shapes import make_prompts
from r2r_glimp.core import Model
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.models.remote import RemoteModel
from r2r_glimp.remote.api import DIALECTS, Ask, Reply
from r2r_glimp.remote.client import Client
from r2r_glimp.remote.spec import RemoteSpec

_LLM_MS = 27.9  # a 32B on an A100, arXiv 2610.12242


Interval = tuple[float, float]


class Watch:
    """Watches what is asked of a remote model.

    Attributes:
        overheads: seconds from asking to the answer, without the model's own time.
        out: when each answer was waited for.
    """

    def __init__(self, client: Client, step_s: float) -> None:
        self._submit, self._step_s = client.submit, step_s
        self.overheads: list[float] = []
        self.out: list[Interval] = []

    def submit(self, ask: Ask, *args: Any, **kwargs: Any) -> "Future[Reply]":
        """Stands where the client's own stands."""
        asked = time.perf_counter()
        future = self._submit(ask, *args, **kwargs)

        def done(_: Any) -> None:
            now = time.perf_counter()
            self.out.append((asked, now))
            self.overheads.append(now - asked - ask.max_tokens * self._step_s)

        future.add_done_callback(done)
        return future


def union(intervals: list[Interval]) -> list[Interval]:
    """The same time, each second once."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def total(intervals: list[Interval]) -> float:
    """Seconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def shared_seconds(some: list[Interval], others: list[Interval]) -> float:
    """Seconds that lie in both of two sorted lists of disjoint intervals."""
    seconds, i, j = 0.0, 0, 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        seconds += max(0.0, end - start)
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return seconds


def run(setting: Setting) -> Report:
    """A routed run over HTTP: overhead of a deferral, and what went on meanwhile."""
    o = setting.options
    step_s = (setting.simulate.llm_ms or _LLM_MS) / 1e3
    slm = setting.pair(slm_only=True).slm
    with _standin(step_s) as url:
        spec = RemoteSpec(url=url, concurrency=max(64, o.batch))
        dialect = DIALECTS["completions"]
        remote = RemoteModel(spec, Client(spec), "m", slm.tokenizer, dialect, slm.context_length)
        engine = setting.engine(
            ModelPair(slm=slm, llm=remote), tokens=o.context + o.tokens, max_batch=max(32, o.batch)
        )
        prompts = make_prompts(o.batch, o.context, slm.fingerprint.vocab_size)
        watch, passes = Watch(remote.client, step_s), list[Interval]()
        forward = engine.runners[Model.SLM].forward

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            rows = forward(*args)
            passes.append((started, time.perf_counter()))
            return rows

        write(engine, prompts, o)  # warm: connections, kernels
        engine.runners[Model.SLM].forward = timed  # type: ignore[assignment]
        remote.client.submit = watch.submit  # type: ignore[method-assign]
        elapsed, deferrals = 0.0, 0
        for _ in range(o.repeats):
            took, outputs = write(engine, prompts, o)
            elapsed += took
            deferrals += sum(output.stats.deferrals for output in outputs)
        remote.client.close()
    out = union(watch.out)
    share = sum(x.stats.llm_tokens for x in outputs) / (o.batch * o.tokens)
    num_tokens = o.batch * o.tokens * o.repeats
    parts = {
        "SLM passes": total(passes) / elapsed,
        "an answer was out": total(out) / elapsed,
        "both at once": shared_seconds(passes, out) / elapsed,
    }
    median = statistics.median(watch.overheads)
    late = statistics.quantiles(watch.overheads, n=20)[-1]
    lines = [
        Line(
            f"routed, LLM share {share:.1%}, {total(watch.out) / elapsed:.1f} answers out at once",
            Sample((elapsed / num_tokens,)),
            tokens=1,
            parts=parts,
        ),
        Line("the LLM's own time", Sample((step_s,))),
        Line(
            "a deferral takes more by", Sample((median,)), ratios={"the LLM's own": median / step_s}
        ),
        Line("95% of them by at most", Sample((late,)), ratios={"the LLM's own": late / step_s}),
    ]
    what = (
        f"{o.batch} sequences of {o.slm_shape}, {deferrals / o.repeats:,.0f} deferrals to a server "
        f"that takes {step_s * 1e3:g} ms a token"
    )
    return Report("remote", what, setting.machine(), setting.paths, lines)


@contextmanager
def _standin(step_s: float) -> Iterator[str]:
    """The stand-in's URL, for as long as this is entered."""
    command = [sys.executable, "-m", "r2r_glimp.bench.standin", str(step_s * 1e3)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()
