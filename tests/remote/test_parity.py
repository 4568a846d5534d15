"""A pair whose models are behind our own server writes what the pair here writes, greedily."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r2r_glimp.core import Model, Prompt, RequestOutput, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair
from tests.serve.conftest import Live

SAMPLING = SamplingParams(max_tokens=120, seed=3)
ROUTINGS = {
    "token": RoutingParams(granularity="token", router="random", threshold=0.3),
    "step": RoutingParams(granularity="step", router="random", threshold=0.6),
    "step, answer routed": RoutingParams(
        granularity="step", router="random", threshold=0.6, answer_by="router"
    ),
    "newline": RoutingParams(
        granularity="step", router="random", threshold=0.6, delimiter="newline"
    ),
    "sentence": RoutingParams(
        granularity="step", router="random", threshold=0.6, delimiter="sentence"
    ),
    "short steps": RoutingParams(
        granularity="step", router="random", threshold=0.6, max_step_tokens=7
    ),
    "capped": RoutingParams(granularity="step", router="random", threshold=0.9, max_llm_share=0.3),
    "no long thinking": RoutingParams(
        granularity="step", router="random", threshold=0.6, max_thinking_tokens=20
    ),
    "llm": RoutingParams(router="llm"),
    "slm": RoutingParams(router="slm"),
}


def told(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    return [(o.text, o.sources, o.finish_reason, o.stats.deferrals) for o in outputs]


@pytest.fixture(scope="module")
def here(local: ModelPair) -> Engine:
    return Engine(local, kv_memory="64MiB")


@pytest.fixture(scope="module")
def there(connect: Callable[..., ModelPair], live: Live) -> Engine:
    """The LLM behind the server, by token ids."""
    return Engine(connect(f"{live.url}/v1#pair:llm"), kv_memory="64MiB", max_batch=4)


@pytest.mark.parametrize("name", ROUTINGS)
def test_by_token_ids(name: str, here: Engine, there: Engine, prompts: list[Prompt]) -> None:
    outputs = there.generate(prompts, SAMPLING, ROUTINGS[name])
    wanted = here.generate(prompts, SAMPLING, ROUTINGS[name])
    assert told(outputs) == told(wanted)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
    there.check_integrity()
    if name in ("token", "step"):  # something was handed over
        assert sum(o.stats.deferrals for o in outputs) > 6


def test_its_kv_is_all_the_slms(there: Engine, here: Engine) -> None:
    assert there.pair.local == (Model.SLM,)
    assert there.runners[Model.LLM].kv_bytes_per_token == 0
    assert there.kv.num_blocks > here.kv.num_blocks


def test_stop_strings_and_stop_ids(here: Engine, there: Engine, prompts: list[Prompt]) -> None:
    for changes in ({"stop": ("gives",)}, {"stop_token_ids": (270,)}, {"ignore_eos": True}):
        sampling = SamplingParams(max_tokens=90, seed=3, **changes)
        for name in ("step", "llm"):
            outputs = [e.generate(prompts[:3], sampling, ROUTINGS[name]) for e in (there, here)]
            assert told(outputs[0]) == told(outputs[1])


def test_preempted_while_it_waits(there: Engine, here: Engine, prompts: list[Prompt]) -> None:
    small = Engine(there.pair, kv_memory=there.runners[0].kv_bytes_per_token * 16 * 17)
    outputs = small.generate(prompts, SAMPLING, ROUTINGS["token"])
    assert told(outputs) == told(here.generate(prompts, SAMPLING, ROUTINGS["token"]))
    assert sum(o.stats.preemptions for o in outputs) > 0
    small.check_integrity()


@pytest.mark.parametrize("name", ["step", "sentence", "llm"])
def test_by_text(
    name: str,
    connect: Callable[..., ModelPair],
    here: Engine,
    live: Live,
    prompts: list[Prompt],
) -> None:
    pair = connect({"url": f"{live.url}/v1", "model": "pair:llm", "api": "text"})
    engine = Engine(pair, kv_memory="64MiB")
    outputs = engine.generate(prompts, SAMPLING, ROUTINGS[name])
    wanted = here.generate(prompts, SAMPLING, ROUTINGS[name])
    assert [o.text for o in outputs] == [o.text for o in wanted]
    assert [o.stats.deferrals for o in outputs] == [o.stats.deferrals for o in wanted]
    engine.check_integrity()


@pytest.mark.parametrize("name", ["step", "answer by the SLM", "no long thinking", "slm"])
def test_both_behind_a_server(name: str, here: Engine, live: Live, prompts: list[Prompt]) -> None:
    """H_init comes from the server's log-probabilities; a kept probe is the step's first token."""
    url = f"{live.url}/v1"
    tokenizer = str(Path(__file__).parents[2] / "checkpoints" / "abacus-slm")
    pair = ModelPair.from_pretrained(
        slm={"url": url, "model": "pair:slm", "tokenizer": tokenizer},
        llm={"url": url, "model": "pair:llm"},
    )
    engine = Engine(pair, kv_memory="1MiB")
    routing = RoutingParams(granularity="step", router="entropy", threshold=0.01, answer_by="slm")
    routing = ROUTINGS.get(name, routing) if name != "step" else routing
    outputs = engine.generate(prompts, SAMPLING, routing)
    wanted = here.generate(prompts, SAMPLING, routing)
    assert [o.text for o in outputs] == [o.text for o in wanted]
    assert [o.stats.decisions for o in outputs] == [o.stats.decisions for o in wanted]
    assert [o.stats.deferrals for o in outputs] == [o.stats.deferrals for o in wanted]
    engine.check_integrity()


def test_sampling_is_the_servers_and_repeats(there: Engine, prompts: list[Prompt]) -> None:
    sampling = SamplingParams(max_tokens=60, seed=5, temperature=0.8, top_p=0.9, top_k=20)
    first, second = (there.generate(prompts[:2], sampling, ROUTINGS["step"]) for _ in range(2))
    assert [o.text for o in first] == [o.text for o in second]
