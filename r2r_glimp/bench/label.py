"""What labeling does most: the LLM writes answers, the SLM reads them row by row."""

import statistics

from r2r_glimp.bench.decode import decode_steps
from r2r_glimp.bench.measure import interleave, seconds
from r2r_glimp.bench.peers import forward_seconds
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.setting import Setting
from r2r_glimp.bench.shapes import make_prompts
from r2r_glimp.core import Model
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prefill import forget_prefixes, read_rows


def run(setting: Setting) -> Report:
    """Seconds per batch: one step of the LLM's answers, and the SLM's rows of a whole answer."""
    o = setting.options
    pair = setting.pair()
    length = o.context + o.tokens
    engine = setting.engine(pair, tokens=length + o.tokens + 16, router="llm")
    vocab_size = pair.slm.fingerprint.vocab_size
    prompts = make_prompts(o.batch, o.context, vocab_size)
    texts = make_prompts(o.batch, length, vocab_size, seed=1)
    runs = {
        "respond: a step of the LLM": lambda: statistics.median(
            decode_steps(engine, prompts, o.tokens)
        ),
        "compare: the SLM reads": lambda: seconds(lambda: _read(engine, texts, o.context)),
    }
    if not o.no_peers:
        peer = setting.peer(Model.SLM)
        runs["HF forward, text by text"] = lambda: sum(forward_seconds(peer, t) for t in texts)
    samples = interleave(runs, o.repeats)
    read = samples["compare: the SLM reads"].median
    lines = []
    for name, sample in samples.items():
        if name.startswith("respond"):
            lines.append(Line(name, sample, tokens=o.batch))
        else:
            ratios = {"the time of compare": sample.median / read} if "HF" in name else {}
            lines.append(Line(name, sample, tokens=o.batch * length, ratios=ratios))
    what = (
        f"{setting.name(Model.LLM)} writes, {setting.name(Model.SLM)} reads, {o.batch} at once, "
        f"{o.tokens} tokens after {o.context}"
    )
    return Report("label", what, setting.machine(), setting.paths, lines)


def _read(engine: Engine, texts: list[list[int]], first: int) -> None:
    forget_prefixes(engine)
    for _, rows in read_rows(engine, Model.SLM, [(text, first - 1) for text in texts]):
        rows.logits_RV.max(-1)
