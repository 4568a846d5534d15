"""How fast a routed pair writes: against its ideal, its own LLM alone, and transformers.

    ideal = T_slm + share x T_llm      seconds per token, both measured in the same run

The share is given, so that this measures speed apart from quality: with one request random
positions are deferred, exactly as many as wanted; with more, each draws its own. What a token costs
above the ideal is shown by where it goes.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from r2r_glimp.bench.decode import decode_steps
from r2r_glimp.bench.measure import Clock, Sample, interleave
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
    shares: list[float] = []
    elapsed: list[float] = []

    def routed() -> float:
        with clock.running():
            took, outputs = _write(engine, prompts, setting)
        elapsed.append(took)
        shares.append(_llm_share(outputs))
        return took / (o.batch * o.tokens)

    def alone(router: str) -> float:
        engine.router = named_router(router)
        return statistics.median(decode_steps(engine, prompts[:1], o.tokens))

    routed()  # warm
    shares.clear()
    elapsed.clear()
    clock.seconds = dict.fromkeys(clock.seconds, 0.0)
    clock.calls = dict.fromkeys(clock.calls, 0)
    runs: dict[str, Callable[[], float]] = {
        "routed": routed,
        "SLM alone": lambda: alone("slm"),
        "LLM alone": lambda: alone("llm"),
    }
    if o.batch > 1:
        runs["routed, one after another"] = lambda: _one_by_one(engine, prompts, setting)
    elif not o.no_peers:
        slm, llm = setting.peer(o.slm_shape), setting.peer(o.llm_shape)
        few = max(4, o.tokens // 8)  # a slow peer need not write as much: a step is a step
        runs["HF generate of the LLM"] = lambda: statistics.median(
            generate_steps(llm, prompts, few)
        )
        runs["HF assisted generation"] = lambda: assisted_seconds(llm, slm, prompts[0], few) / few
    samples = interleave(runs, o.repeats)
    return Report(
        "route", _what(setting), setting.machine(), setting.paths,
        _lines(samples, statistics.mean(shares), clock, sum(elapsed), o.batch),
    )  # fmt: skip


def _lines(
    samples: dict[str, Sample], share: float, clock: Clock, elapsed: float, batch: int
) -> list[Line]:
    routed = samples["routed"].median
    ideals = tuple(
        slm + share * llm
        for slm, llm in zip(samples["SLM alone"].values, samples["LLM alone"].values, strict=True)
    )
    ideal = Sample(ideals)
    parts = {name: spent / elapsed for name, spent in clock.seconds.items()}
    parts["scheduler, text"] = 1 - sum(parts.values())
    ratios = {} if batch > 1 else {"of ideal": ideal.median / routed}
    lines = [
        Line(
            f"routed, LLM share {share:.1%}",
            samples["routed"],
            tokens=1,
            ratios=ratios,
            parts=parts,
        ),
        Line("ideal: T_slm + share x T_llm", ideal, tokens=1),
    ]
    for name, sample in samples.items():
        if name != "routed":
            compared = {"the time of routed": sample.median / routed}
            lines.append(Line(name, sample, tokens=1, ratios=compared))
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
    return (
        f"a token of {o.slm_shape} + {o.llm_shape}, {wanted}{steps} to the LLM, "
        f"batch {o.batch}, context {o.context}"
    )


def _routing(setting: Setting) -> RoutingParams:
    o = setting.options
    router: str | Router = o.router
    if o.router == "random" and o.batch == 1:
        places = range(0, o.tokens, 1 if o.granularity == "token" else o.step_tokens)
        count = round(o.share * len(places))
        router = ReplayRouter(random.Random(0).sample(places, count))
    return RoutingParams(
        granularity="token" if o.granularity == "token" else "step",
        router=router,
        threshold=o.share if router == "random" else None,
        max_step_tokens=o.step_tokens,
        repetition_guard=False,  # noise repeats itself
    )


def _write(
    engine: Engine, prompts: list[list[int]], setting: Setting
) -> tuple[float, list[RequestOutput]]:
    """Seconds in which every request writes its tokens, prompts included; and the outputs. The
    router draws the same numbers every time."""
    samplings = [replace(fixed_length(setting.options.tokens), seed=i) for i in range(len(prompts))]
    started = time.perf_counter()
    requests: list[Prompt] = [*prompts]
    outputs = engine.generate(requests, samplings, _routing(setting))
    return time.perf_counter() - started, outputs


def _one_by_one(engine: Engine, prompts: list[list[int]], setting: Setting) -> float:
    took = sum(_write(engine, [prompt], setting)[0] for prompt in prompts)
    return took / (len(prompts) * setting.options.tokens)


def _llm_share(outputs: list[RequestOutput]) -> float:
    llm = sum(output.stats.llm_tokens for output in outputs)
    return llm / sum(len(output.token_ids) for output in outputs)
