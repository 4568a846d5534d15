"""What the engine itself takes: models that compute nothing, everything else as ever.

Plans, block tables, sampling, routing, text and events are all there; only the call of the model
is not. Sampling is over the shape's vocabulary: take a small one (`--slm_shape tiny`) to see Python
alone.
"""

import statistics
from types import SimpleNamespace
from typing import Any

import torch

from r2r_glimp.bench.measure import Sample, interleave, seconds
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.setting import Setting, fixed_length
from r2r_glimp.bench.shapes import make_prompts
from r2r_glimp.core import Model, RoutingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import ModelRunner

CONTEXTS = (1024, 4096, 16384)
QUEUED, RUNNING = 10_000, 64


def run(setting: Setting) -> Report:
    """Seconds of host time per generated token: at the batch, over contexts, with a long queue."""
    o = setting.options
    pair = setting.pair(slm_only=True)
    vocab_size = pair.slm.fingerprint.vocab_size

    def per_token(num: int, context: int, queued: int, routing: RoutingParams) -> float:
        engine = _engine(setting, pair, max_batch=num, tokens=num * (context + 2 * o.tokens + 64))
        sampling = fixed_length(o.tokens + 4)
        for prompt in make_prompts(num, context, vocab_size):
            engine.add_request(prompt, sampling, routing)
        for _ in range(queued):
            engine.add_request([1, 2, 3], sampling, routing)
        engine.step()
        while not all(s.tokens for s in engine.running):
            engine.step()
        return statistics.median(seconds(engine.step) for _ in range(o.tokens)) / num

    def routed(batch: int) -> RoutingParams:
        return RoutingParams(router="random", threshold=o.share, repetition_guard=False)

    alone = RoutingParams(router="slm")
    runs = {
        f"batch {o.batch}": lambda: per_token(o.batch, o.context, 0, alone),
        f"batch {o.batch}, routed per token": lambda: per_token(
            o.batch, o.context, 0, routed(o.batch)
        ),
        f"batch {RUNNING}": lambda: per_token(RUNNING, 16, 0, alone),
        f"batch {RUNNING}, {QUEUED:,} queued": lambda: per_token(RUNNING, 16, QUEUED, alone),
    }
    for context in CONTEXTS:
        runs[f"batch 1, context {context:,}"] = lambda n=context: per_token(1, n, 0, alone)  # type: ignore[misc]
    samples = interleave(runs, o.repeats)
    lines = [
        Line(name, sample, tokens=1, ratios=_growth(name, samples))
        for name, sample in samples.items()
    ]
    model = setting.name(Model.SLM)
    what = f"host time per generated token, models of {model} that compute nothing"
    return Report("overhead", what, setting.machine(), setting.paths, lines)


def _growth(name: str, samples: dict[str, Sample]) -> dict[str, float]:
    base = {
        f"batch 1, context {context:,}": f"batch 1, context {CONTEXTS[0]:,}"
        for context in CONTEXTS[1:]
    } | {f"batch {RUNNING}, {QUEUED:,} queued": f"batch {RUNNING}"}
    if name not in base:
        return {}
    return {f"the time of {base[name]}": samples[name].median / samples[base[name]].median}


def _engine(setting: Setting, pair: Any, *, max_batch: int, tokens: int) -> Engine:
    engine = setting.engine(
        pair, tokens=tokens // setting.options.batch + 64, max_batch=max_batch, graphs=False
    )
    for runner in set(engine.runners):
        _compute_nothing(runner)
    return engine


def _compute_nothing(runner: ModelRunner) -> None:
    """Make a runner's model return the same logits at once."""
    fingerprint = runner.loaded.fingerprint
    logits = torch.zeros(1, 256, fingerprint.vocab_size, dtype=runner.loaded.dtype)
    hidden = torch.zeros(1, 256, fingerprint.hidden_size, dtype=runner.loaded.dtype)

    def nothing(logits_to_keep: torch.Tensor, **_: Any) -> SimpleNamespace:
        runner._hidden = hidden[:, : len(logits_to_keep)]
        return SimpleNamespace(logits=logits[:, : len(logits_to_keep)])

    runner.model = nothing  # type: ignore[assignment]
