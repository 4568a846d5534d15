"""One request's failure is its own: aborts and NaN logits never reach a neighbour, and leave no
block behind."""

import random

import torch

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import FinishEvent, RequestOutput, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import Rows
from r2r_glimp.models import ModelPair

POISON = 400  # a token id only poisoned prompts hold


def test_200_requests_with_aborts_and_nan(
    engine_pair: ModelPair, words: list[int], monkeypatch
) -> None:
    rng = random.Random(0)
    requests = []
    for i in range(200):
        prompt = [rng.choice(words[:-1]) for _ in range(rng.randint(1, 50))]
        fate = rng.choice(["fine", "fine", "fine", "abort", "nan"])
        sampling = SamplingParams(
            max_tokens=rng.randint(5, 40),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            ignore_eos=True,
        )
        routing = RoutingParams(
            granularity=rng.choice(["token", "step"]),
            router=rng.choice(["entropy", "random", "margin", "llm", "slm"]),
            threshold=rng.choice([0.3, 0.8]),
        )
        requests.append(([POISON, *prompt] if fate == "nan" else prompt, sampling, routing, fate))

    def run_alone() -> dict[int, RequestOutput]:
        engine = Engine(engine_pair, kv_memory="4MiB")
        return {
            i: engine.generate([prompt], sampling, routing)[0]
            for i, (prompt, sampling, routing, fate) in enumerate(requests)
            if fate == "fine"
        }

    expected = run_alone()

    engine = Engine(engine_pair, kv_memory="96KiB", max_batch=16, max_batch_tokens=64)
    for runner in engine.runners:
        _poison(runner, rng, monkeypatch)
    order = {engine.add_request(p, s, r): i for i, (p, s, r, _) in enumerate(requests)}
    outputs: dict[int, RequestOutput] = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, FinishEvent):
                outputs[order[event.request_id]] = event.output
        engine.check_integrity()
        for sequence in list(engine.running):
            if requests[order[sequence.request_id]][3] == "abort" and rng.random() < 0.2:
                engine.abort(sequence.request_id)
    for event in engine.step():
        outputs[order[event.request_id]] = event.output

    assert len(outputs) == 200
    assert engine.kv.pools[0].num_free == engine.kv.num_blocks
    fates = {i: request[3] for i, request in enumerate(requests)}
    for i, output in outputs.items():
        if fates[i] == "fine":
            assert (output.token_ids, output.sources) == (
                expected[i].token_ids,
                expected[i].sources,
            )
        elif fates[i] == "nan":
            assert output.finish_reason == "error"
            assert output.error is not None and "NaN" in output.error


def _poison(runner, rng: random.Random, monkeypatch) -> None:
    """Make the runner's logits of rows of poisoned prompts NaN, and their KV too."""
    forward = runner.forward
    poisoned: set[int] = set()  # block ids: the first block of a table tells whose row it is

    @torch.inference_mode()
    def bad(rows: list[Row], wanted: list[int]) -> Rows:
        result = forward(rows, wanted)
        offset = 0
        for row, num_wanted in zip(rows, wanted, strict=True):
            if row.start == 0:
                poisoned.discard(row.blocks[0])
                if row.tokens[0] == POISON:
                    poisoned.add(row.blocks[0])
            if row.blocks[0] in poisoned:
                result.logits_RV[offset : offset + num_wanted] = torch.nan
                for layer in runner.backend.keys + runner.backend.values:
                    layer[:, row.blocks[0] * 16 : row.blocks[0] * 16 + 16] = torch.nan
            offset += num_wanted
        return result

    monkeypatch.setattr(runner, "forward", bad)
