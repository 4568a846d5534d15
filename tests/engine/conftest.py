"""A babbling pair: two tiny random models whose few words are the ones the engine's rules look
at."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from r2r_glimp.models import LoadedModel, ModelPair
from tests.engine.fixed import run_uncaptured

WORDS = (
    "Sum",
    " hats",
    " 4",
    " 7",
    "!",
    "\n",
    "\n\n",
    ".\n\n",
    "<think>",
    "</think>",
    "<|im_end|>",
)
RARE = ("</think>", "<|im_end|>")


class Babble(nn.Module):
    """Output embeddings that all but forbid everything outside a few words."""

    def __init__(self, hidden_size: int, vocab_size: int, ids: list[int], rare: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, hidden_size) / 2)
        bias = torch.full((vocab_size,), -8.0)
        bias[ids] = 0.0
        bias[rare] = -1.5
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T + self.bias


def babbler(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    vocab_size = -(-len(tokenizer) // 32) * 32
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            initializer_range=0.3,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]
    rare = [tokenizer.convert_tokens_to_ids(word) for word in RARE]
    model.set_output_embeddings(Babble(32, vocab_size, ids, rare))
    return model.eval()


@pytest.fixture(scope="session")
def words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the babblers' words."""
    return [tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]


@pytest.fixture(scope="session")
def make_pair(tokenizer: PreTrainedTokenizerFast) -> Callable[[], ModelPair]:
    """Fresh copies of one babbling pair: an engine changes how its models attend."""
    models = [babbler(tokenizer, seed) for seed in (1, 2)]

    def make() -> ModelPair:
        slm, llm = (
            LoadedModel.from_model(copy.deepcopy(m), tokenizer, name=name)
            for m, name in zip(models, ("tiny-slm", "tiny-llm"), strict=True)
        )
        return ModelPair(slm=slm, llm=llm)

    return make


@pytest.fixture(scope="session")
def plain_pair(make_pair: Callable[[], ModelPair]) -> ModelPair:
    """The pair with transformers' own attention, for references."""
    return make_pair()


@pytest.fixture(scope="session")
def engine_pair(make_pair: Callable[[], ModelPair]) -> ModelPair:
    """The pair that engines of the tests run."""
    return make_pair()


@pytest.fixture(scope="session")
def cuda_pair(make_pair: Callable[[], ModelPair]) -> ModelPair:
    """The pair on the GPU."""
    pair = make_pair()
    for loaded in (pair.slm, pair.llm):
        loaded.model.to("cuda")
    return pair


@pytest.fixture(params=["ragged", "fixed", pytest.param("cuda", marks=pytest.mark.gpu)])
def path_pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelPair:
    """The pair that engines run on every path: ragged batches; passes of fixed shape as CUDA graphs
    hold them, run without capture; CUDA graphs."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda_pair")
    if request.param == "fixed":
        run_uncaptured(monkeypatch)
    return request.getfixturevalue("engine_pair")
