"""The kernels compute what torch computes; what cannot be exchanged is left alone."""

import copy
import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from r2r_glimp.attention import backends as backends_module
from r2r_glimp.attention.gather import GatherBackend, Row
from r2r_glimp.attention.native import LONG, NativeBackend, NativeBatch
from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.core import RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import ModelRunner
from r2r_glimp.models import LoadedModel, ModelPair
from r2r_glimp.native import library as library_module
from r2r_glimp.native import modules
from r2r_glimp.native.layer import NativeLayer
from r2r_glimp.native.library import LEVELS, Library, load_library

LIBRARY = load_library()
needs_library = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no kernels: {LIBRARY}")
needs_bf16 = pytest.mark.skipif(
    isinstance(LIBRARY, str) or not LIBRARY.has_linear, reason="this CPU has no bf16 products"
)
each_level = pytest.mark.parametrize("level", LEVELS)
each_product = pytest.mark.parametrize("level", ["amx", "avx512"])


def library_of(level: str) -> Library:
    """The kernels of a level; skips the test, with the reason, where there are none."""
    library = load_library(level)
    if isinstance(library, str):
        pytest.skip(f"kernels={level}: {library}")
    return library


@each_product
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 12, 17, 40, 65, 130])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (34, 31), (64, 96), (288, 100)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(level: str, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, rows, inputs).bfloat16()
    exact = nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    got = modules.NativeLinear(linear, library_of(level))(x)
    assert torch.allclose(got.double(), exact, rtol=2**-8, atol=1e-6 * inputs)


@each_product
def test_more_panels_and_rows_than_a_cache_holds(level: str) -> None:
    """Every loop of the product of many rows goes round more than once."""
    torch.manual_seed(0)
    linear = nn.Linear(544, 640, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 550, 544).bfloat16()
    exact = x.float() @ linear.weight.float().T
    got = modules.NativeLinear(linear, library_of(level))(x)
    assert torch.allclose(got.float(), exact, rtol=2**-7, atol=1e-3)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_the_gather_backend(level: str, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    library = library_of(level)
    for trial in range(30):
        spec = LayerSpec(
            kv_heads=rng.choice([1, 2, 3]),
            head_dim=(head_dim := rng.choice([4, 16, 24, 64, 128])),
            value_dim=rng.choice([4, 16, head_dim]),
            scaling=0.3,
            sliding_window=rng.choice([None, None, 1, 7, 40]),
            softcap=rng.choice([None, None, 2.0]),
            has_sinks=trial % 3 == 0,
        )
        heads = spec.kv_heads * rng.choice([1, 2, 5])
        gather = GatherBackend([spec], 64, dtype, torch.device("cpu"))
        native = NativeBackend(library, [spec], 64, dtype)
        blocks = rng.sample(range(1, 65), 64)
        for plane, other in ((gather.keys, native.keys), (gather.values, native.values)):
            plane[0].copy_(torch.randn(plane[0].shape))
            other[0].copy_(plane[0])
        rows = []
        for _ in range(rng.randint(1, 5)):
            start, length = rng.choice([0, 1, 15, 16, 100]), rng.choice([1, 2, 9, LONG + 3])
            num_blocks = -(-(start + length) // 16)
            rows.append(Row([0] * length, start, array("i", blocks[:num_blocks])))
            blocks = blocks[num_blocks:]
        total = sum(len(row.tokens) for row in rows)
        query, key = (
            torch.randn(total, n, spec.head_dim).to(dtype) for n in (heads, spec.kv_heads)
        )
        value = torch.randn(total, spec.kv_heads, spec.value_dim).to(dtype)
        sinks = torch.randn(heads) if spec.has_sinks else None
        wanted, got = (
            backend.plan(rows).attend(0, query, key, value, spec, sinks)
            for backend in (gather, native)
        )
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        assert torch.allclose(got.float(), wanted.float(), atol=tolerance, rtol=tolerance), spec
        assert torch.equal(gather.keys[0], native.keys[0])
        assert torch.equal(gather.values[0], native.values[0])


@needs_library
def test_nan_stays_nan() -> None:
    assert isinstance(LIBRARY, Library)
    for dtype, dim in ((torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 32)):
        spec = LayerSpec(1, dim, dim, 1.0, None, None, False)
        backend = NativeBackend(LIBRARY, [spec], 4, dtype)
        query, key, value = (torch.randn(6, 1, dim).to(dtype) for _ in range(3))
        key[1] = torch.nan
        batch = backend.plan([Row([0] * 6, 0, array("i", [2]))])
        out = batch.attend(0, query, key, value, spec, None)
        assert out.isnan().any(-1).flatten().tolist() == [False, *[True] * 5]
    norm = modules.NativeRMSNorm(nn.Parameter(torch.ones(8)), 1e-6, LIBRARY)
    assert norm(torch.tensor([[torch.nan] * 8])).isnan().all()


@each_level
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3", "gemma2", "gpt_oss"])
def test_bf16_is_as_exact_as_the_models_own(
    level: str,
    family: str,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    library_of(level)
    model = tiny_model(family, seed=5)
    prompt = [random.Random(1).randrange(5, 300) for _ in range(90)]
    with torch.inference_mode():
        model = model.bfloat16()
        wanted = copy.deepcopy(model).float()(torch.tensor([prompt])).logits[0]
        own = model(torch.tensor([prompt])).logits[0]
    runner = ModelRunner(LoadedModel.from_model(model, tokenizer), level)
    runner.allocate(num_blocks=8)
    table = array("i", [3, 1, 2, 5, 4, 6])
    parts = [runner.forward([Row(prompt[:70], 0, table)], [70]).logits_RV]
    parts += [
        runner.forward([Row(prompt[i : i + n], i, table)], [n]).logits_RV
        for i, n in ((70, 13), (83, 1), (84, 1), (85, 5))
    ]
    error = (torch.cat(parts).float() - wanted).abs().mean()
    assert error <= 1.1 * (own.float() - wanted).abs().mean()


@needs_bf16
def test_which_layers_are_exchanged(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """A layer without rotary embedding, or with another residual, stays as it is."""
    found = {}
    for family in ("qwen3", "smollm3", "granite", "olmo2", "gemma2"):
        model = tiny_model(family, seed=0).bfloat16()
        ModelRunner(LoadedModel.from_model(model, tokenizer))
        found[family] = [isinstance(layer, NativeLayer) for layer in model.base_model.layers]
    assert found == {
        "qwen3": [True, True],
        "smollm3": [True, False],
        "granite": [False, False],
        "olmo2": [False, False],
        "gemma2": [False, False],
    }


@needs_bf16
def test_layers_run_in_one_call_and_can_be_looked_at(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """A layer whose output is kept ends a run; what follows is the same."""
    model = tiny_model("qwen3", seed=5).bfloat16()
    runner = ModelRunner(LoadedModel.from_model(model, tokenizer))
    runner.allocate(num_blocks=2)
    calls: list[tuple[int, int]] = []
    original = NativeBatch.run_layers

    def counted(batch: NativeBatch, structs: int, first: int, count: int, *rest: Any) -> None:
        calls.append((first, count))
        original(batch, structs, first, count, *rest)

    rows = [Row([5, 6, 7], 0, array("i", [1]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeBatch, "run_layers", counted)
        whole = runner.forward(rows, [3])
        runner.keep_layer(1)
        parts = runner.forward(rows, [3])
    assert calls == [(0, 2), (0, 1), (1, 1)]
    assert torch.equal(whole.logits_RV, parts.logits_RV)
    assert parts.layers[1].shape == parts.hidden_RH.shape
    assert not torch.equal(parts.layers[1], parts.hidden_RH)


def test_a_second_engine_finds_the_work_done(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = LoadedModel.from_model(tiny_model("qwen3", seed=0).bfloat16(), tokenizer)
    first = ModelRunner(loaded).paths
    assert ModelRunner(loaded).paths == first


def test_tied_embeddings_stay(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("qwen3", seed=0, tie_word_embeddings=True)
    size = sum(p.numel() for p in model.parameters())
    before = model.get_input_embeddings().weight.clone()
    loaded = LoadedModel.from_model(model, tokenizer)
    ModelRunner(loaded)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert loaded.num_parameters == size


def test_without_a_compiler_the_engine_says_so_and_is_as_right(
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    def generate() -> list[int]:
        loaded = LoadedModel.from_model(tiny_model("qwen3", seed=1), tokenizer)
        engine = Engine(ModelPair(slm=loaded, llm=loaded), kv_memory="8MiB")
        return engine.generate(
            [[7, 8, 9]], SamplingParams(max_tokens=8), RoutingParams(router="slm")
        )[0].token_ids

    wanted = generate()
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    library_module.load_library.cache_clear()
    try:
        assert "no C++ compiler" in str(library_module.load_library())
        assert generate() == wanted
        assert "attention gathers pages" in caplog.text
    finally:
        library_module.load_library.cache_clear()


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'error: no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library_module.load_library.cache_clear()
    try:
        assert "broken-c++ failed: error: no such option" in str(library_module.load_library())
    finally:
        library_module.load_library.cache_clear()


def test_kernels_that_do_not_exist_are_refused(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = LoadedModel.from_model(tiny_model("qwen3", seed=1), tokenizer)
    with pytest.raises(UsageError, match="auto, amx, avx512, onednn, torch"):
        ModelRunner(loaded, "fast")


def test_kernels_that_this_cpu_has_not_are_refused(
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = LoadedModel.from_model(tiny_model("qwen3", seed=1), tokenizer)
    monkeypatch.setattr(backends_module, "load_library", lambda level: f"this CPU has no {level}")
    with pytest.raises(UsageError, match="kernels='amx' is not to be had here: this CPU has no"):
        ModelRunner(loaded, "amx")
    half = LoadedModel.from_model(tiny_model("qwen3", seed=1).half(), tokenizer)
    with pytest.raises(UsageError, match="is for bfloat16 or float32 on the CPU"):
        ModelRunner(half, "avx512")


@needs_library
def test_without_the_systems_leave_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Library):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.has_tiles = False

    monkeypatch.setattr(library_module, "Library", Refused)
    load_library.cache_clear()
    try:
        library = load_library()
        assert isinstance(library, Refused) and library.level != "amx"
        assert isinstance(load_library("amx"), str)
    finally:
        load_library.cache_clear()


@needs_bf16
def test_a_model_keeps_the_kernels_it_was_given(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = LoadedModel.from_model(tiny_model("qwen3", seed=0).bfloat16(), tokenizer)
    paths = ModelRunner(loaded, "avx512").paths
    assert "avx512" in paths
    assert ModelRunner(loaded).paths == paths
    with pytest.raises(UsageError, match="load it again"):
        ModelRunner(loaded, "onednn")
