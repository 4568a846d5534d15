"""Capacity on paper: the real engine over models that only move a clock.

Scheduler, routing, KV manager, preemption and batching are the engine's own; a forward pass takes
the time it is said to take, or was measured to take, and computes nothing. So a machine nobody has
yet answers how many users it serves, at which time per token, at which share.

    one device      SLM ─▶ LLM ─▶ SLM ─▶ …            one clock, passes one after another
    --overlap       SLM ─▶ SLM ─▶ SLM ─▶ …            the LLM is a server of its own: it takes all
                    └LLM──────┘└LLM──────┘            that wait when it is free, the SLM goes on
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from r2r_glimp.attention.gather import Row
from r2r_glimp.bench.measure import Sample, interleave
from r2r_glimp.bench.options import BenchOptions
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.route import routing_of, write
from r2r_glimp.bench.server import Clock, ServedLLM
from r2r_glimp.bench.setting import Setting, fixed_length, kv_width
from r2r_glimp.bench.shapes import make_pair, make_prompts
from r2r_glimp.bench.steptime import StepTime, measure
from r2r_glimp.core import Model, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prefill import forget_prefixes
from r2r_glimp.engine.runner import ModelRunner, Rows
from r2r_glimp.kv.pool import BLOCK_SIZE
from r2r_glimp.models.pair import ModelPair

# arXiv 2610.12242, ablation on A100s, Qwen3-0.6B + 32B: tokens/s by requests; share 0.35.
PUBLISHED = {1: 73.0, 4: 211.0, 8: 372.0}
PUBLISHED_MS, PUBLISHED_SHARE = (6.0, 27.9), 0.35
_MOST_USERS = 1024
_OTHER_SEED = 10_000  # step times are measured on other decisions than those that are foretold
_TOKEN = 300  # what every simulated model writes


@dataclass(frozen=True, slots=True)
class Outcome:
    """A simulated run: virtual seconds, and of them how long each model was busy."""

    seconds: float
    busy: tuple[float, float]
    share: float  # LLM share that came out


def run(setting: Setting) -> Report:
    """Time per token by number of users; and where step times were measured, what the real engine
    takes beside what was foretold."""
    o, sim = setting.options, setting.simulate
    if (sim.slm_ms is None) != (sim.llm_ms is None):
        raise UsageError("slm_ms and llm_ms go together: give both, or none to measure them")
    if sim.slm_ms is None or sim.llm_ms is None:
        return _compare(setting)
    times = (
        StepTime.stated(sim.slm_ms, sim.slm_token_us),
        StepTime.stated(sim.llm_ms, sim.llm_token_us),
    )
    pair = _tiny_pair(setting)
    found: dict[int, tuple[Outcome, int]] = {}

    def best(users: int) -> float:
        """Seconds per token of a user, with the LLM's best batching."""
        if users not in found:
            tried = {1} if sim.overlap else {1, max(1, users // 4), max(1, users // 2)}
            outcomes = {n: foretell(setting, pair, times, users, n) for n in sorted(tried)}
            waits = min(outcomes, key=lambda n: outcomes[n].seconds)
            found[users] = outcomes[waits], waits
        return found[users][0].seconds / o.tokens

    lines = []
    for users in sim.users or (1, 4, 8, 16, 32, 64):
        per_token = best(users)
        outcome, waits = found[users]
        lines.append(_line(users, per_token, outcome, waits))
        if _is_published(o, sim) and users in PUBLISHED:
            theirs = users / PUBLISHED[users]
            name = f"{users} in TokenRouter's table"
            ratios = {"the time foretold here": theirs / per_token}
            lines.append(Line(name, Sample((theirs,)), tokens=users, ratios=ratios))
    what = _what(o, sim.slm_ms, sim.llm_ms, sim.overlap)
    if sim.token_ms is not None:
        what += f"; at {sim.token_ms:g} ms a token: {_most_users(best, sim.token_ms)} users"
    return Report("simulate", what, setting.machine(), {}, lines)


def foretell(
    setting: Setting,
    pair: ModelPair,
    times: tuple[StepTime, StepTime],
    users: int,
    llm_min_batch: int = 1,
) -> Outcome:
    """Run so many users through an engine whose models take the given times."""
    o, sim = setting.options, setting.simulate
    clock = Clock()
    served = ServedLLM(clock, times[Model.LLM], _TOKEN) if sim.overlap else None
    if served is not None:
        pair = ModelPair(slm=pair.slm, llm=served.model(pair.slm.tokenizer, o.context + o.tokens))
    kv_tokens = sim.kv_tokens or users * (o.context + o.tokens + 2 * BLOCK_SIZE)
    engine = Engine(
        pair,
        router="slm",
        kv_memory=kv_tokens * kv_width(pair),
        max_batch=max(32, users),
        llm_min_batch=llm_min_batch,
        llm_max_wait=4 if llm_min_batch == 1 else 64,
        kernels="torch",
    )
    # As in a measured run, the prompts are known: what counts is writing.
    prompts = make_prompts(users, o.context, 1000)
    with clocked(engine, clock, times):
        for prompt in prompts:
            engine.add_request(prompt, fixed_length(1))
        for _ in _drain(engine, served):
            pass
        start, busy = clock.now, tuple(clock.busy)
        llm = total = 0
        for i, prompt in enumerate(prompts):
            sampling = replace(fixed_length(o.tokens), seed=i)
            engine.add_request(prompt, sampling, routing_of(o, users))
        for output in _drain(engine, served):
            llm, total = llm + output.stats.llm_tokens, total + len(output.token_ids)
    spent = [after - before for after, before in zip(clock.busy, busy, strict=True)]
    return Outcome(clock.now - start, (spent[0], spent[1]), llm / total)


@contextmanager
def clocked(engine: Engine, clock: Clock, times: tuple[StepTime, StepTime]) -> Iterator[None]:
    """Meanwhile, an engine's models compute nothing and move the clock."""
    runners = [(m, engine.runners[m]) for m in engine.pair.local]
    for model, runner in runners:
        runner.forward = _timed(runner, model, clock, times[model])  # type: ignore[assignment]
    try:
        yield
    finally:
        for _, runner in runners:
            del runner.forward


def _timed(
    runner: ModelRunner, model: Model, clock: Clock, step_time: StepTime
) -> Callable[[list[Row], list[int]], Rows]:
    loaded = runner.loaded
    logits_V = torch.zeros(1, loaded.fingerprint.vocab_size, dtype=loaded.dtype)
    logits_V[0, _TOKEN] = 1.0
    hidden_H = torch.zeros(1, loaded.fingerprint.hidden_size, dtype=loaded.dtype)

    def forward(rows: list[Row], wanted: list[int]) -> Rows:
        clock.work(model, step_time.seconds(sum(len(row.tokens) for row in rows)))
        count = sum(wanted)
        return Rows(hidden_H.expand(count, -1), logits_V.expand(count, -1))

    return forward


def _drain(engine: Engine, served: ServedLLM | None) -> Iterator[Any]:
    """Run until nothing is left; what finished. With all waiting for the LLM, time goes to its next
    answer."""
    while engine.has_work:
        running = engine.running
        if served is not None and running and all(s.pending is not None for s in running):
            served.wait()
        for event in engine.step():
            if hasattr(event, "output"):
                yield event.output


# ---------------------------------------------------------------- against the real engine


def _compare(setting: Setting) -> Report:
    """Measure step times, foretell a routed run from them, and run it."""
    o = setting.options
    pair = setting.pair()
    engine = setting.engine(pair, tokens=o.context + 2 * o.tokens + 32, prefix_cache=True)
    length = -(-o.context // BLOCK_SIZE) * BLOCK_SIZE + 1
    prompts = make_prompts(o.batch, length, pair.slm.fingerprint.vocab_size)
    shares: list[float] = []

    def real() -> float:
        took, outputs = write(engine, prompts, o)
        llm = sum(output.stats.llm_tokens for output in outputs)
        shares.append(llm / (o.batch * o.tokens))
        return took / o.tokens

    def foretold() -> float:
        measured = measure(engine, lambda: write(engine, prompts, o, seed=_OTHER_SEED))
        clock = Clock()
        with clocked(engine, clock, measured.passes):
            write(engine, prompts, o)
        forget_prefixes(engine)  # what was computed is nothing
        write(engine, prompts, o)
        return (clock.now + clock.num_passes * measured.host_s) / o.tokens

    real()
    samples = interleave({"real": real, "foretold": foretold}, o.repeats)
    # Pair by pair: a slow spell hits both of a round.
    pairs = zip(samples["foretold"].values, samples["real"].values, strict=True)
    ratio = statistics.median(said / took for said, took in pairs)
    lines = [
        Line(f"{o.batch} users, LLM share {shares[-1]:.1%}", samples["real"], tokens=o.batch),
        Line(
            "foretold from step times",
            samples["foretold"],
            tokens=o.batch,
            ratios={"the time it took": ratio},
        ),
    ]
    what = f"a token of {o.slm_shape} + {o.llm_shape}, foretold and run, per {o.granularity}"
    return Report("simulate", what, setting.machine(), setting.paths, lines)


# ---------------------------------------------------------------- words


def _line(users: int, per_token: float, outcome: Outcome, waits: int) -> Line:
    name = f"{users} users" if waits == 1 else f"{users} users, LLM waits for {waits}"
    parts = {
        f"{m.label.upper()} busy": busy / outcome.seconds
        for m, busy in zip(Model, outcome.busy, strict=True)
    }
    parts["LLM share"] = outcome.share
    return Line(name, Sample((per_token,)), tokens=users, parts=parts)


def _what(o: BenchOptions, slm_ms: float, llm_ms: float, overlap: bool) -> str:
    where = "the LLM on a device of its own" if overlap else "both on one device"
    steps = "" if o.granularity == "token" else f" of {o.step_tokens} tokens"
    return (
        f"SLM {slm_ms:g} ms, LLM {llm_ms:g} ms a pass, {o.share:.0%} of "
        f"{o.granularity}s{steps} to the LLM, {where}, {o.tokens} tokens each"
    )


def _is_published(o: BenchOptions, sim: Any) -> bool:
    same = (sim.slm_ms, sim.llm_ms) == PUBLISHED_MS and o.share == PUBLISHED_SHARE
    return same and o.granularity == "token"


def _most_users(seconds_per_token: Callable[[int], float], token_ms: float) -> int:
    """The most users that get their tokens in time, by bisection."""
    low, high = 0, 1
    while high <= _MOST_USERS and seconds_per_token(high) * 1e3 <= token_ms:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if middle <= _MOST_USERS and seconds_per_token(middle) * 1e3 <= token_ms:
            low = middle
        else:
            high = middle
    return low


def _tiny_pair(setting: Setting) -> ModelPair:
    """Two models: which ones does not matter, they compute nothing."""
    one, two = (make_pair("tiny", "tiny", torch.float32, torch.device("cpu")) for _ in range(2))
    return ModelPair(slm=one.slm, llm=two.slm)
