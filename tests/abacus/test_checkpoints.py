"""The bundled pair is what the docs say: ordinary checkpoints, small, and far enough apart."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from r2r_glimp.abacus.table import measure, sample
from r2r_glimp.core import RoutingParams
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
    questions = sample("test", 100)
    slm, llm = (measure(engine, questions, RoutingParams(router=r)) for r in ("slm", "llm"))
    assert llm.accuracy >= 0.9
    assert 0.25 <= slm.accuracy <= 0.85
    assert slm.llm_share == 0 and llm.llm_share == 1
