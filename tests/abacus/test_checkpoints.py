"""The bundled pair is what the docs say: ordinary checkpoints, small, and far enough apart."""

from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from r2r_glimp.abacus.problems import is_correct, problems
from r2r_glimp.core import RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_config("abacus")


def test_the_checkpoints_are_ordinary_and_small() -> None:
    for name in ("abacus-slm", "abacus-llm"):
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
        assert type(model).__name__ == "Qwen3ForCausalLM"
        assert tokenizer.chat_template and tokenizer.is_fast
    size = sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file())
    assert size < 16e6


def test_the_llm_is_much_larger_and_shares_the_vocabulary(pair: ModelPair) -> None:
    assert pair.same_vocabulary
    assert pair.llm.num_parameters >= 6 * pair.slm.num_parameters


def test_the_llm_is_right_and_the_slm_often_is_not(pair: ModelPair) -> None:
    """A smoke test of the table in docs/abacus.md, wide enough not to fail by chance."""
    engine = Engine(pair, kv_memory="64MiB", max_batch=64)
    questions = list(islice(problems("test"), 100))
    prompts = [[{"role": "user", "content": question.prompt()}] for question in questions]
    right = {}
    for router in ("slm", "llm"):
        outputs = engine.generate(prompts, SamplingParams(), RoutingParams(router=router))  # type: ignore[arg-type]
        right[router] = sum(is_correct(q, o.text) for q, o in zip(questions, outputs, strict=True))
        assert {source for output in outputs for source in output.sources} == {router}
    assert right["llm"] >= 90
    assert 25 <= right["slm"] <= 85
