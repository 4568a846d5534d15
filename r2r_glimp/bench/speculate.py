"""What speculation takes and gives: the LLM alone, and with an SLM that drafts for it.

Random models never agree, so both compute as ever and are then made to propose the next token of
a given text, the SLM as often as `agreement` says. Whether that pays is this machine's ratio of a
pass over one token to one over a few.
"""

import random
from collections.abc import Callable

import torch

from r2r_glimp.bench.measure import Sample, interleave, seconds
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.setting import Setting, fixed_length
from r2r_glimp.bench.shapes import make_prompts
from r2r_glimp.core import Model, Prompt, RequestOutput, RoutingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.passes import Computed
from r2r_glimp.engine.runner import Rows
from r2r_glimp.engine.sampling import Stream
from r2r_glimp.engine.sequence import Sequence
from r2r_glimp.kv.pool import BLOCK_SIZE

AGREEMENTS = (0.0, 0.6, 0.8, 0.95)


def run(setting: Setting) -> Report:
    """Seconds per token of `router=llm`, without drafts and with ones that are right so often."""
    o = setting.options
    pair = setting.pair()
    engine = setting.engine(pair, tokens=o.context + 2 * o.tokens + 32, prefix_cache=True)
    length = -(-o.context // BLOCK_SIZE) * BLOCK_SIZE + 1
    prompts = make_prompts(o.batch, length, pair.slm.fingerprint.vocab_size)

    def write(speculate: int) -> list[RequestOutput]:
        requests: list[Prompt] = [*prompts]
        routing = RoutingParams(router="llm", speculate=speculate)
        return engine.generate(requests, fixed_length(o.tokens), routing)

    texts = [prompt + output.token_ids for prompt, output in zip(prompts, write(0), strict=True)]
    oracle = _Oracle(engine, texts, length)
    write(o.speculate)  # warm

    def per_token(speculate: int, agreement: float = 1.0) -> float:
        oracle.agreement = agreement
        return seconds(lambda: write(speculate)) / (o.batch * o.tokens)

    runs: dict[str, Callable[[], float]] = {"LLM alone": lambda: per_token(0)}
    for agreement in AGREEMENTS:
        runs[f"drafts right {agreement:.0%}"] = lambda a=agreement: per_token(o.speculate, a)  # type: ignore[misc]
    samples = interleave(runs, o.repeats)
    alone = samples["LLM alone"].median
    lines = [_line(name, sample, alone) for name, sample in samples.items()]
    what = (
        f"a token of {o.llm_shape}, {o.slm_shape} drafts up to {o.speculate}, batch {o.batch}, "
        f"context {o.context}"
    )
    return Report("speculate", what, setting.machine(), setting.paths, lines)


def _line(name: str, sample: Sample, alone: float) -> Line:
    ratios = {} if name == "LLM alone" else {"the time of LLM alone": sample.median / alone}
    return Line(name, sample, tokens=1, ratios=ratios)


class _Oracle:
    """Makes the models of an engine propose the tokens of given texts.

    The LLM's too: several rows at once are rounded otherwise than one, and a text of random weights
    would turn elsewhere.

    Args:
        engine: whose models they are.
        texts: token ids from the beginning, prompt included.
        length: tokens of a prompt; prompts differ.
    """

    def __init__(self, engine: Engine, texts: list[list[int]], length: int) -> None:
        self.agreement = 1.0
        self._length = length
        self._texts = {tuple(text[:length]): text for text in texts}
        self._random = random.Random(0)
        passes = engine.tick.passes
        self._run = passes.run
        passes.run = self._agree  # type: ignore[method-assign]

    @torch.inference_mode()
    def _agree(
        self, model: Model, candidates: list[Sequence], stream: Stream
    ) -> tuple[list[Computed], Rows]:
        batch, rows = self._run(model, candidates, stream)
        for one in batch:
            timeline = one.sequence.timelines[model]
            text = self._texts[tuple(timeline.tokens[: self._length])]
            # The row of a token says what follows it; the LLM's may be several, behind drafts.
            for row, place in zip(reversed(one.wanted), range(one.row.end, 0, -1), strict=False):
                right = model is Model.LLM or self._random.random() < self.agreement
                rows.logits_RV[row] = 0
                rows.logits_RV[row, text[place] if right and place < len(text) else 0] = 1
        return batch, rows
