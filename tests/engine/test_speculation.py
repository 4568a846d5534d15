"""Speculation changes no text: the LLM's own token stands at every position, drafted or not."""

import copy
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from r2r_glimp.core import RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import LoadedModel, ModelPair

PROMPTS = [[7, 8, 9], [5, 6], [11] * 20]


@pytest.fixture(scope="module")
def twins(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> ModelPair:
    """One model as both: whatever it drafts is right."""
    model = tiny_model("qwen3", seed=1)
    slm, llm = (LoadedModel.from_model(copy.deepcopy(model), tokenizer, name=n) for n in "ab")
    return ModelPair(slm=slm, llm=llm)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_right_drafts_are_all_taken(twins: ModelPair, temperature: float) -> None:
    engine = Engine(twins, router="llm", kv_memory="8MiB")
    sampling = SamplingParams(max_tokens=33, temperature=temperature, seed=3, ignore_eos=True)
    plain = engine.generate([*PROMPTS], sampling)
    drafted = engine.generate([*PROMPTS], sampling, RoutingParams(speculate=4))
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    for output in drafted:
        assert output.stats.draft_accepted == output.stats.draft_tokens > 20
        assert output.stats.llm_tokens == 33 and output.stats.slm_tokens == 0
    engine.check_integrity()


def test_wrong_drafts_cost_but_change_nothing(engine_pair: ModelPair) -> None:
    engine = Engine(engine_pair, router="llm", kv_memory="8MiB")
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=5, logprobs=1, ignore_eos=True)
    plain = engine.generate([*PROMPTS], sampling)
    drafted = engine.generate([*PROMPTS], sampling, RoutingParams(speculate=6))
    for one, other in zip(plain, drafted, strict=True):
        assert other.token_ids == one.token_ids
        assert [p.token for p in other.logprobs or ()] == other.token_ids
        assert other.stats.draft_accepted < other.stats.draft_tokens
    assert any(output.stats.draft_accepted for output in drafted)


def test_a_token_span_has_nothing_to_draft(engine_pair: ModelPair) -> None:
    engine = Engine(engine_pair, kv_memory="8MiB")
    routing = RoutingParams(granularity="token", router="random", threshold=0.5, speculate=4)
    output = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=20, seed=1), routing)[0]
    assert output.stats.draft_tokens == 0


def test_what_speculation_excludes() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        RoutingParams(speculate=2, trace=True)
    with pytest.raises(UsageError, match="speculate=-1 is out of range"):
        RoutingParams(speculate=-1)
