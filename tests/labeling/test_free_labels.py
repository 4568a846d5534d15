"""Free labels of routed outputs."""

from itertools import islice

import pytest

from labeling.free import label_outputs
from labeling.schema import Label
from r2r_glimp import Engine, Model, RoutingParams, SamplingParams, UsageError
from r2r_glimp.abacus.problems import problems
from r2r_glimp.models import ModelPair


def test_rows_of_traces_cost_the_llm_nothing(pair: ModelPair) -> None:
    engine = Engine(pair, router="random", kv_memory="64MiB")
    prompts = [[{"role": "user", "content": p.prompt()}] for p in islice(problems("validation"), 4)]
    sampling = SamplingParams(max_tokens=120, seed=1)
    outputs = engine.generate(prompts, sampling, RoutingParams(trace=True, threshold=0.2))
    runner = engine.runners[Model.LLM]
    calls = []
    original = runner.forward
    runner.forward = lambda *args: calls.append(1) or original(*args)  # type: ignore[method-assign, func-returns-value]
    rows = label_outputs(engine, outputs, source="chats")
    runner.forward = original  # type: ignore[method-assign]
    assert not calls
    engine.check_integrity()
    known = [
        (f"{o.request_id}/{o.index}", d.position, d.token if d.source == "llm" else d.llm_token)
        for o in outputs
        for d in o.trace or []
        if d.source == "llm" or d.llm_token is not None
    ]
    assert [(row["response_id"], row["position"]) for row in rows] == [k[:2] for k in known]
    for row, (_, _, choice) in zip(rows, known, strict=True):
        agree = row["slm_token"] == choice
        assert row["label"] == (Label.IDENTICAL if agree else Label.DIVERGENT)
    assert set(rows["source"]) == {"chats"} and set(rows["label"]) == {0, 2}


def test_outputs_without_a_trace(pair: ModelPair) -> None:
    engine = Engine(pair, router="slm", kv_memory="64MiB")
    outputs = engine.generate("How many?", SamplingParams(max_tokens=3))
    with pytest.raises(UsageError, match=r"has no trace: ask for it with RoutingParams"):
        label_outputs(engine, outputs)
