"""How fast a routed pair writes: against its ideal, its own LLM alone, and transformers.

    ideal = T_slm + share x T_llm      seconds per token, both measured in the same run

The share is given, so that this measures speed apart from quality: with one request random
positions are deferred, exactly as many as wanted; with more, each draws its own. What a token costs
above the ideal is shown by where it goes.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from r2r_glimp.bench.decode import decode_steps
from r2r_glimp.bench.measure import Clock, Sample, interleave, weight_bytes
from r2r_glimp.bench.options import BenchOptions
from r2r_glimp.bench.peers import assisted_seconds, generate_steps
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.setting import Setting, fixed_length
from r2r_glimp.bench.shapes import make_prompts
from r2r_glimp.core import Model, Prompt, RequestOutput, RoutingParams
from r2r_glimp.engine import tick as tick_module
from r2r_glimp.engine.engine import Engine
from r2r_glimp.kv.pool import BLOCK_SIZE
from r2r_glimp.routing.routers import ReplayRouter, Router, named_router


def run(setting: Setting) -> Report:
    """Seconds per token of a routed pair; with a batch, at once and one after another."""
    o = setting.options
    pair = setting.pair()
    read = (weight_bytes(pair.slm.model), weight_bytes(pair.llm.model))
    # Prompts are read once, in the warm-up: the prefix cache keeps them for both models, all but
    # the last token.
    engine = setting.engine(pair, tokens=o.context + 2 * o.tokens + 32, prefix_cache=True)
    length = -(-o.context // BLOCK_SIZE) * BLOCK_SIZE + 1
    prompts = make_prompts(o.batch, length, pair.slm.fingerprint.vocab_size)
    clock = Clock(
        {
            "SLM": _passes(engine, Model.SLM),
            "LLM": _passes(engine, Model.LLM),
            "router": [(engine.decider, "deferred")],
            "sampling": [(tick_module, "sampled")],
        }
    )
    ticks = Clock({"ticks": [(engine, "step")]})
    shares: list[float] = []
    elapsed: list[float] = []

    def routed() -> float:
        with clock.running(), ticks.running():
            took, outputs = write(engine, prompts, o)
        elapsed.append(took)
        shares.append(_llm_share(outputs))
        return took / (o.batch * o.tokens)

    def alone(router: str) -> float:
        engine.router = named_router(router)
        return statistics.median(decode_steps(engine, prompts[:1], o.tokens))

    routed()  # warm
    shares.clear()
    elapsed.clear()
    clock.reset()
    ticks.reset()
    runs: dict[str, Callable[[], float]] = {
        "routed": routed,
        "SLM alone": lambda: alone("slm"),
        "LLM alone": lambda: alone("llm"),
    }
    if o.batch > 1:
        runs["routed, the LLM never waits for company"] = lambda: _impatient(
            engine, prompts, setting
        )
        runs["routed, one after another"] = lambda: _one_by_one(engine, prompts, setting)
    elif not o.no_peers:
        slm, llm = setting.peer(Model.SLM), setting.peer(Model.LLM)
        few = max(4, o.tokens // 8)  # a slow peer need not write as much: a step is a step
        runs["HF generate of the SLM"] = lambda: statistics.median(
            generate_steps(slm, prompts, few)
        )
        runs["HF generate of the LLM"] = lambda: statistics.median(
            generate_steps(llm, prompts, few)
        )
        runs["HF assisted generation"] = lambda: assisted_seconds(llm, slm, prompts[0], few) / few
    samples = interleave(runs, o.repeats)
    whole, share = sum(elapsed), statistics.mean(shares)
    parts = {name: spent / whole for name, spent in clock.seconds.items()}
    parts["scheduler, text"] = ticks.seconds["ticks"] / whole - sum(parts.values())
    parts["idle"] = 1 - sum(parts.values())
    lines = _lines(samples, share, parts, read, o.batch)
    return Report("route", _what(setting), setting.machine(), setting.paths, lines)


def _lines(
    samples: dict[str, Sample],
    share: float,
    parts: Mapping[str, float],
    read: tuple[int, int],
    batch: int,
) -> list[Line]:
    """The table; `read` is what a pass over the SLM and over the LLM reads at least, bytes."""
    routed = samples["routed"].median
    ideals = tuple(
        slm + share * llm
        for slm, llm in zip(samples["SLM alone"].values, samples["LLM alone"].values, strict=True)
    )
    ideal = Sample(ideals)
    # Several at once read a weight for all of them: what one of them reads is not known.
    slm, llm = read
    bytes_read = {"SLM alone": slm, "LLM alone": llm, "HF generate of the SLM": slm}
    bytes_read["HF generate of the LLM"] = llm
    ratios = {} if batch > 1 else {"of ideal": ideal.median / routed}
    lines = [
        Line(
            f"routed, LLM share {share:.1%}",
            samples["routed"],
            tokens=1,
            bytes_read=slm + share * llm if batch == 1 else None,
            ratios=ratios,
            parts=parts,
        ),
        Line("ideal: T_slm + share x T_llm", ideal, tokens=1, bytes_read=slm + share * llm),
    ]
    for name, sample in samples.items():
        if name != "routed":
            compared = {"the time of routed": sample.median / routed}
            lines.append(
                Line(name, sample, tokens=1, bytes_read=bytes_read.get(name), ratios=compared)
            )
    return lines


def _passes(engine: Engine, model: Model) -> list[tuple[Any, str]]:
    """What computes a model: ragged passes, and captured ones where there are any; those draw and
    score too."""
    graphs = engine.tick.passes.graphs[model]
    return [(engine.runners[model], "forward"), *([(graphs, "run")] if graphs else [])]


def _what(setting: Setting) -> str:
    o = setting.options
    wanted = f"{o.share:.1%} of {'tokens' if o.granularity == 'token' else 'steps'}"
    steps = f" of {o.step_tokens} tokens" if o.granularity == "step" else ""
    pair = " + ".join(setting.name(model) for model in Model)
    return f"a token of {pair}, {wanted}{steps} to the LLM, batch {o.batch}, context {o.context}"


def routing_of(o: BenchOptions, users: int, seed: int = 0) -> RoutingParams:
    """The routing that gives the wanted share, with so many requests at once."""
    router: str | Router = o.router
    if o.router == "random" and users == 1:
        places = range(0, o.tokens, 1 if o.granularity == "token" else o.step_tokens)
        count = round(o.share * len(places))
        router = ReplayRouter(random.Random(seed).sample(places, count))
    return RoutingParams(
        granularity="token" if o.granularity == "token" else "step",
        router=router,
        threshold=o.share if router == "random" else None,
        max_step_tokens=o.step_tokens,
        repetition_guard=False,  # noise repeats itself
    )


def write(
    engine: Engine, prompts: list[list[int]], o: BenchOptions, seed: int = 0
) -> tuple[float, list[RequestOutput]]:
    """Seconds in which every request writes its tokens, prompts included; and the outputs. The
    router draws the same numbers every time."""
    samplings = [replace(fixed_length(o.tokens), seed=seed + i) for i in range(len(prompts))]
    started = time.perf_counter()
    requests: list[Prompt] = [*prompts]
    outputs = engine.generate(requests, samplings, routing_of(o, len(prompts), seed))
    return time.perf_counter() - started, outputs


def _impatient(engine: Engine, prompts: list[list[int]], setting: Setting) -> float:
    engine.tick.patience.min_batch = 1
    try:
        return write(engine, prompts, setting.options)[0] / (len(prompts) * setting.options.tokens)
    finally:
        engine.tick.patience.min_batch = None


def _one_by_one(engine: Engine, prompts: list[list[int]], setting: Setting) -> float:
    took = sum(write(engine, [prompt], setting.options)[0] for prompt in prompts)
    return took / (len(prompts) * setting.options.tokens)


def _llm_share(outputs: list[RequestOutput]) -> float:
    llm = sum(output.stats.llm_tokens for output in outputs)
    return llm / sum(len(output.token_ids) for output in outputs)
