"""How fast a prompt is read: against transformers' forward pass, and against finding it in the
prefix cache."""

from collections.abc import Callable

from r2r_glimp.bench.measure import interleave, seconds
from r2r_glimp.bench.peers import forward_seconds
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.setting import Setting, fixed_length
from r2r_glimp.bench.shapes import make_prompts
from r2r_glimp.core import Model, Prompt
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prefill import forget_prefixes

_MIN_CONTEXT = 64


def run(setting: Setting) -> Report:
    """Seconds to the first token of a prompt of `context` tokens under the small model's shape."""
    o = setting.options
    context = max(o.context, _MIN_CONTEXT)
    pair = setting.pair(slm_only=True)
    engine = setting.engine(pair, tokens=context, prefix_cache=True)
    prompt = make_prompts(1, context, pair.slm.fingerprint.vocab_size)[0]
    runs: dict[str, Callable[[], float]] = {
        "r2r_glimp, cold": lambda: _first_token(engine, prompt, cold=True),
        "r2r_glimp, prefix known": lambda: _first_token(engine, prompt, cold=False),
    }
    if not o.no_peers:
        peer = setting.peer(Model.SLM)
        runs["HF forward"] = lambda: forward_seconds(peer, prompt)
    samples = interleave(runs, o.repeats)
    cold = samples["r2r_glimp, cold"].median
    lines = [
        Line(
            name,
            sample,
            tokens=context,
            ratios={} if name.endswith("cold") else {"the time of cold": sample.median / cold},
        )
        for name, sample in samples.items()
    ]
    what = f"time to the first token of {setting.name(Model.SLM)}, prompt of {context} tokens"
    return Report("prefill", what, setting.machine(), setting.paths, lines)


def _first_token(engine: Engine, prompt: Prompt, *, cold: bool) -> float:
    if cold:
        forget_prefixes(engine)
    return seconds(lambda: engine.generate([prompt], fixed_length(1)))
