"""Paged attention under unmodified Hugging Face models equals the models themselves."""

import copy
import random
from array import array
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from r2r_glimp.attention.gather import Row
from r2r_glimp.attention.paged import install
from r2r_glimp.core import CheckpointError, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import KERNELS, ModelRunner
from r2r_glimp.models import LoadedModel, ModelPair

FAMILIES = (
    "llama qwen2 qwen3 qwen3_moe mistral gemma2 phi3 gpt_oss "
    "granite olmo2 smollm3 cohere2 gpt_neox gpt2 opt mixtral gemma3_text deepseek_v3"
).split()
NUM_TOKENS = 24
PATHS = [
    *((torch.device("cpu"), kernels) for kernels in KERNELS),
    *(
        pytest.param(torch.device("cuda"), kernels, marks=pytest.mark.gpu, id=f"cuda-{kernels}")
        for kernels in KERNELS
    ),
]


def prompts_for(vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, vocab_size) for _ in range(n)] for n in (1, 3, 15, 16, 17, 40)]


def hf_generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("device", "kernels"), PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(
    family: str,
    device: torch.device,
    kernels: str,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    models = [tiny_model(family, seed=seed) for seed in (1, 2)]
    prompts = prompts_for(len(tokenizer))
    expected = [[hf_generate(model, prompt) for prompt in prompts] for model in models]
    slm, llm = (
        LoadedModel.from_model(copy.deepcopy(m).to(device), tokenizer, name=f"{family}-{i}")
        for i, m in enumerate(models)
    )
    # A small token budget, so that prompts are chunked and chunks meet decoding rows in one batch.
    engine = Engine(
        ModelPair(slm=slm, llm=llm), kv_memory="16MiB", max_batch_tokens=16, kernels=kernels
    )
    for router, wanted in zip(("slm", "llm"), expected, strict=True):
        outputs = engine.generate(
            prompts, SamplingParams(max_tokens=NUM_TOKENS), RoutingParams(router=router)
        )
        assert [output.token_ids for output in outputs] == wanted


@pytest.mark.parametrize(("device", "kernels"), PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_close_under_ragged_chunks(
    family: str,
    device: torch.device,
    kernels: str,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_model(family, seed=3)
    prompts = prompts_for(len(tokenizer))
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]
    loaded = LoadedModel.from_model(copy.deepcopy(model).to(device), tokenizer, name=family)
    runner = ModelRunner(loaded, kernels)
    runner.allocate(num_blocks=64)
    tables = [array("i", [10 * i + 3, 10 * i + 1, 10 * i + 2]) for i in range(len(prompts))]
    got: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    rng = random.Random(1)
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        live = [i for i, p in enumerate(prompts) if done[i] < len(p)]
        sizes = [min(rng.choice((1, 2, 7, 20)), len(prompts[i]) - done[i]) for i in live]
        rows = [
            Row(prompts[i][done[i] : done[i] + n], done[i], tables[i])
            for i, n in zip(live, sizes, strict=True)
        ]
        logits = runner.forward(rows, sizes).logits_RV.cpu().split(sizes)
        for i, n, part in zip(live, sizes, logits, strict=True):
            got[i].append(part)
            done[i] += n
    for parts, wanted in zip(got, expected, strict=True):
        assert (torch.cat(parts) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_architectures_that_bypass_the_interface_are_refused_by_name(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family, seed=0)
    with pytest.raises(CheckpointError, match=type(model).__name__):
        install(model)


def test_hidden_states_are_those_before_the_output_embeddings(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("qwen3", seed=4)
    prompt = prompts_for(len(tokenizer))[3]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    runner = ModelRunner(LoadedModel.from_model(copy.deepcopy(model), tokenizer))
    runner.allocate(num_blocks=4)
    rows = runner.forward([Row(prompt, 0, array("i", [1]))], [2])
    assert torch.allclose(rows.hidden_RH, expected[-2:], atol=1e-5)
