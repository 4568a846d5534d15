"""How fast one model decodes: against the memory bandwidth, and against transformers."""

import statistics
import time
from collections.abc import Callable

from r2r_glimp.bench.measure import interleave, weight_bytes
from r2r_glimp.bench.peers import generate_batch_steps, generate_steps
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.setting import Setting, fixed_length
from r2r_glimp.bench.shapes import make_prompts
from r2r_glimp.core import Model
from r2r_glimp.engine.engine import Engine


def run(setting: Setting) -> Report:
    """Seconds of a decoding step of the small model's shape."""
    o = setting.options
    pair = setting.pair(slm_only=True)
    model_bytes = weight_bytes(pair.slm.model)
    engine = setting.engine(pair, tokens=o.context + o.tokens * o.repeats + o.tokens)
    kv_bytes = engine.runners[Model.SLM].kv_bytes_per_token * (o.context + o.tokens // 2) * o.batch
    prompts = make_prompts(o.batch, o.context, pair.slm.fingerprint.vocab_size)
    runs: dict[str, Callable[[], float]] = {
        "r2r_glimp": lambda: statistics.median(decode_steps(engine, prompts, o.tokens))
    }
    if not o.no_peers:
        peer = setting.peer(Model.SLM)
        runs["HF generate"] = lambda: statistics.median(generate_steps(peer, prompts, o.tokens))
        if o.batch > 1:
            batched = setting.peer(Model.SLM)
            runs["HF generate_batch"] = lambda: statistics.median(
                generate_batch_steps(batched, prompts, o.tokens)
            )
    samples = interleave(runs, o.repeats)
    ours = samples["r2r_glimp"].median
    lines = [
        Line(
            name,
            sample,
            tokens=o.batch,
            bytes_read=model_bytes + kv_bytes,
            ratios={} if name == "r2r_glimp" else {"the time of r2r_glimp": sample.median / ours},
        )
        for name, sample in samples.items()
    ]
    what = f"one step of {setting.name(Model.SLM)}, batch {o.batch}, context {o.context}"
    return Report("decode", what, setting.machine(), setting.paths, lines)


def decode_steps(engine: Engine, prompts: list[list[int]], tokens: int) -> list[float]:
    """Seconds of each of `tokens` ticks in which every request writes a token."""
    ids = [engine.add_request(prompt, fixed_length(2 * tokens + 8)) for prompt in prompts]
    while engine.scheduler.waiting or not all(s.tokens for s in engine.running):
        engine.step()
    times = []
    for _ in range(tokens):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    for request_id in ids:
        engine.abort(request_id)
    engine.step()
    return times
