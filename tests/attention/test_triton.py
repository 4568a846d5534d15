"""The Triton kernels compute what the gather backend computes: on a GPU, or under Triton's
interpreter on the CPU."""

import math
import os
import random
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r2r_glimp.attention.backends import BackendChoice
from r2r_glimp.attention.gather import GatherBackend, Row
from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.attention.rows import RowBuffer
from r2r_glimp.attention.varlen import find_varlen, flash_reads_small_pages
from r2r_glimp.core import RoutingParams, SamplingParams
from r2r_glimp.engine import graphs
from r2r_glimp.engine import runner as runner_module
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import ModelRunner
from r2r_glimp.kv.pool import BLOCK_SIZE
from r2r_glimp.models import LoadedModel, ModelPair
from tests.tiny import make_tiny_model

pytest.importorskip("triton", reason="Triton is not installed")

from r2r_glimp.attention.triton import LONG, TritonBackend, why_not  # noqa: E402

NUM_BLOCKS = 64
SPEC = LayerSpec(
    kv_heads=2,
    head_dim=16,
    value_dim=16,
    scaling=0.3,
    sliding_window=None,
    softcap=None,
    has_sinks=False,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_group": {"kv_heads": 1},
    "window": {"sliding_window": 7},
    "window_of_one": {"sliding_window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"has_sinks": True},
    "all": {"sliding_window": 40, "softcap": 2.0, "has_sinks": True},
    "odd_sizes": {"kv_heads": 3, "head_dim": 24, "value_dim": 8},
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here")
    return torch.device(request.param)


class Bench:
    """Both backends over the same random planes, and a batch of rows with new queries, keys and
    values."""

    def __init__(
        self,
        device: torch.device,
        spec: LayerSpec,
        shapes: list[tuple[int, int]],  # start and new tokens of each row
        dtype: torch.dtype = torch.float32,
        group: int = 2,
    ) -> None:
        torch.manual_seed(0)
        self.spec, self.device, self.dtype = spec, device, dtype
        self.gather = GatherBackend([spec], NUM_BLOCKS, dtype, device)
        self.triton = TritonBackend([spec], NUM_BLOCKS, dtype, device)
        for plane, other in (
            (self.gather.keys, self.triton.keys),
            (self.gather.values, self.triton.values),
        ):
            plane[0].copy_(torch.randn(plane[0].shape))
            other[0].copy_(plane[0])
        free = random.Random(0).sample(range(1, NUM_BLOCKS + 1), NUM_BLOCKS)
        self.rows = []
        for start, new in shapes:
            num_blocks = -(-(start + new) // BLOCK_SIZE)
            self.rows.append(Row([0] * new, start, array("i", free[:num_blocks])))
            free = free[num_blocks:]
        num_tokens = sum(new for _, new in shapes)
        heads = spec.kv_heads * group
        self.query = self.random(num_tokens, heads, spec.head_dim)
        self.key = self.random(num_tokens, spec.kv_heads, spec.head_dim)
        self.value = self.random(num_tokens, spec.kv_heads, spec.value_dim)
        self.sinks = torch.randn(heads, device=device) if spec.has_sinks else None

    def random(self, *shape: int) -> Tensor:
        # heads outside, as the models hand them over
        x = torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1)
        return x.to(self.device, self.dtype)

    def wanted(self) -> Tensor:
        return self.gather.plan(self.rows).attend(
            0, self.query, self.key, self.value, self.spec, self.sinks
        )

    def got(self) -> Tensor:
        return self.triton.plan(self.rows).attend(
            0, self.query, self.key, self.value, self.spec, self.sinks
        )

    def check(self, got: Tensor | None = None) -> None:
        wanted, got = self.wanted(), self.got() if got is None else got
        tolerance = 1e-5 if self.dtype is torch.float32 else 0.03
        assert torch.allclose(got.float(), wanted.float(), atol=tolerance, rtol=tolerance)
        assert torch.equal(self.gather.keys[0], self.triton.keys[0])
        assert torch.equal(self.gather.values[0], self.triton.values[0])


RAGGED = [(0, 1), (15, 1), (100, 3), (16, 9), (0, 40)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_equal_the_gather_backend(variant: str, device: torch.device) -> None:
    Bench(device, replace(SPEC, **VARIANTS[variant]), RAGGED).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    Bench(device, replace(SPEC, sliding_window=40), [(100, 1), (0, 5)], dtype).check()


@pytest.mark.parametrize("variant", ["plain", "window", "sinks", "softcap"])
@pytest.mark.parametrize("splits", [2, 8])
def test_a_split_context_gives_the_same(
    variant: str, splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(device, replace(SPEC, **VARIANTS[variant]), [(200, 1), (3, 2), (0, 1)])
    monkeypatch.setattr(bench.triton, "num_splits", lambda *_: splits)
    bench.check()


def test_one_row_spreads_over_the_gpu_and_many_do_not(device: torch.device) -> None:
    backend = TritonBackend([SPEC], 1, torch.float32, device)
    backend.num_processors = 132
    assert backend.num_splits(num_programs=8, max_context=32768) == 32
    assert backend.num_splits(num_programs=8, max_context=1024) == 4
    assert backend.num_splits(num_programs=64, max_context=32768) == 4
    assert backend.num_splits(num_programs=1000, max_context=32768) == 1
    assert backend.num_splits(num_programs=8, max_context=16) == 1


@pytest.mark.parametrize("group", [1, 5, 8, 20])
def test_groups_of_query_heads(group: int, device: torch.device) -> None:
    Bench(device, SPEC, [(33, 1), (0, 6)], group=group).check()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_every_part_of_a_buffer_is_aligned(num_rows: int, device: torch.device) -> None:
    """Triton compiles a kernel anew for pointers that are not multiples of 16."""
    buffer = RowBuffer(num_rows, num_rows + 1, 3, device, num_columns=3)
    t = buffer.tensors(1)
    parts = (t.slots_T, t.first_N, t.room_N, t.new_N, t.lengths_N, t.tables_NP, buffer.ids_T)
    assert all(part.data_ptr() % 16 == 0 for part in (*parts, buffer.columns_CN))


@pytest.mark.parametrize("num_real", [0, 1, 3])
def test_padding_writes_nothing_and_gives_zeros(num_real: int, device: torch.device) -> None:
    """Tensors of a shape that never changes: 4 rows of 4 tokens, whatever is in them."""
    shapes = [(18, 1), (0, 4), (5, 3)][:num_real]
    bench = Bench(device, SPEC, shapes)
    buffer = RowBuffer(4, 16, 8, device)
    buffer.fill([Row([7] * 4, 40, array("i", [60, 61, 62]))] * 4, room=4)  # what was there before
    buffer.fill(bench.rows, room=4)
    buffer.send()
    place = torch.cat(
        [torch.arange(4 * i, 4 * i + new) for i, (_, new) in enumerate(shapes)]
        or [torch.zeros(0, dtype=torch.long)]
    ).to(device)

    def spread(x_TQD: Tensor) -> Tensor:
        return torch.full((16, *x_TQD.shape[1:]), torch.nan, device=device).index_copy(
            0, place, x_TQD
        )

    before = bench.triton.keys[0].clone()
    out = bench.triton.bind(buffer.tensors(4)).attend(
        0, spread(bench.query), spread(bench.key), spread(bench.value), SPEC, None
    )
    if num_real:
        bench.check(out[place])
    else:
        assert torch.equal(bench.triton.keys[0], before)
    padding = torch.ones(16, dtype=torch.bool).index_fill(0, place.cpu(), False)
    assert (out[padding.to(device)] == 0).all()


def test_a_first_kernel_tells_whether_triton_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_not(device) is None

    def refuse(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(TritonBackend, "store", refuse)
        assert why_not(device) == "Failed to find C compiler."
    monkeypatch.setattr(TritonBackend, "attend", lambda self, layer, query, out, *_: out.zero_())
    assert why_not(device) == "a kernel gave a wrong result"


def test_nan_stays_with_who_had_it(device: torch.device) -> None:
    bench = Bench(device, SPEC, [(0, 3), (0, 2)])
    bench.key[1] = torch.nan
    assert bench.got().isnan().any(-1).any(-1).tolist() == [False, True, True, False, False]


def varlen_by_hand(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What torch.nn.attention.varlen.varlen_attn says it computes; itself it runs on GPUs only."""
    out = []
    for i, (a, b) in enumerate(zip(cu_seq_q[:-1], cu_seq_q[1:], strict=True)):
        if block_table is not None:
            assert seqused_k is not None and cu_seq_k is None and block_table.dtype is torch.int32
            pages = -(-int(seqused_k[i]) // key.shape[1])
            k, v = (
                x[block_table[i, :pages].long()].flatten(0, 1)[: seqused_k[i]] for x in (key, value)
            )
        else:
            assert cu_seq_k is not None
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        q, (left, right) = query[a:b], window_size
        assert q.shape[0] <= max_q and k.shape[0] <= max_k and right == 0
        assert enable_gqa or q.shape[1] == k.shape[1]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        # bottom right: the last query stands at the last key
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (distance >= 0) & ((distance <= left) | torch.tensor(left < 0))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        probs = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", probs, v))
    return torch.cat(out)


@pytest.mark.parametrize("reads_tables", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("shapes", [[(0, 70)], [(0, LONG), (20, 1), (37, LONG + 9), (0, 2)]])
def test_long_chunks_attend_by_torch(
    shapes: list[tuple[int, int]], window: int | None, reads_tables: bool
) -> None:
    bench = Bench(torch.device("cpu"), replace(SPEC, sliding_window=window), shapes)
    calls = []

    def varlen(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return varlen_by_hand(*args, **kwargs)

    bench.triton.varlen, bench.triton.reads_tables = varlen, reads_tables
    bench.check()
    assert len(calls) == 1


@pytest.mark.parametrize(("active", "reads"), [(None, False), ("FA3", True), ("FA4", False)])
def test_only_fa3_reads_pages_of_16_tokens(
    active: str | None, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active)
    assert flash_reads_small_pages() is reads


def test_varlen_attention_is_for_half_precision() -> None:
    assert find_varlen(torch.bfloat16) is torch.nn.attention.varlen.varlen_attn
    assert find_varlen(torch.float32) is None


def test_long_chunks_that_torch_cannot_attend_for_go_through_the_kernel() -> None:
    bench = Bench(torch.device("cpu"), replace(SPEC, softcap=2.0), [(0, LONG), (3, 1)])

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("varlen attention knows no softcap")

    bench.triton.varlen = refuse
    bench.check()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_varlen_attention_is_what_we_take_it_for(
    dtype: torch.dtype, window: int | None
) -> None:
    bench = Bench(
        torch.device("cuda"),
        replace(SPEC, head_dim=64, value_dim=64, sliding_window=window),
        [(0, LONG), (20, 1), (37, LONG + 9)],
        dtype,
    )
    assert bench.triton.varlen is not None
    bench.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_parity runs them on the GPU")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_models_on_the_kernels(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model(family, tokenizer, seed=3)
    tokens = [random.Random(0).randrange(5, 300) for _ in range(37)]
    expected = model(torch.tensor([tokens]), use_cache=False).logits[0]
    runner = ModelRunner(LoadedModel.from_model(model, tokenizer), "torch")
    runner.backend = TritonBackend(runner.layers, 8, torch.float32, torch.device("cpu"))
    table = array("i", [7, 2, 5])
    got = [
        runner.forward([Row(tokens[a:b], a, table)], [b - a]).logits_RV
        for a, b in ((0, 20), (20, 36), (36, 37))
    ]
    assert (torch.cat(got) - expected).abs().max() < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_reference runs engines on the GPU")
def test_an_engine_on_the_kernels_with_passes_of_fixed_shape(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the CUDA path but the capture: planes, plans, bound tensors, shapes, draws."""
    slm, llm = (
        LoadedModel.from_model(make_tiny_model("qwen3", tokenizer, seed), tokenizer)
        for seed in (1, 2)
    )
    prompts = [[50, 60, 70], [81] * 17]
    sampling = [
        SamplingParams(max_tokens=6, seed=1),
        SamplingParams(max_tokens=5, temperature=1, seed=0),
    ]
    options: dict[str, Any] = {"router": "random", "kv_memory": "1MiB", "max_batch": 2}

    def run() -> list[tuple[list[int], list[str]]]:
        engine = Engine(ModelPair(slm=slm, llm=llm), kernels="torch", **options)
        outputs = engine.generate(prompts, sampling, RoutingParams(threshold=0.4))
        return [(output.token_ids, list(output.sources)) for output in outputs]

    expected = run()
    choice = BackendChoice(
        "Triton", lambda layers, n: TritonBackend(layers, n, torch.float32, torch.device("cpu"))
    )
    monkeypatch.setattr(runner_module, "choose_backend", lambda *_: choice)
    monkeypatch.setattr(graphs, "capture_on", lambda device: lambda body: body)
    assert run() == expected
    assert {"slm", "llm"} == {source for _, sources in expected for source in sources}


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from r2r_glimp.attention import triton_kernels as kernels

def check(kernel, arch, pointer, floats, **constants):
    pointers = "query key value keys values out parts sinks".split()
    integers = "slots first_of room_of new_of length_of tables".split()
    kinds = {
        **dict.fromkeys(pointers, f"*{pointer}"), **dict.fromkeys(integers, "*i32"),
        "lse": "*fp32", "scaling": "fp32", "softcap": "fp32", **floats,
        **dict.fromkeys(constants, "constexpr"),
    }
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        kernel,
        {name: kinds.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    made = compile(source, target=GPUTarget("cuda", arch, 32))
    assert "cubin" in made.asm
    print(kernel.fn.__name__, arch, made.metadata.shared, "mma" in made.asm["ptx"])

sizes = dict(HEAD_DIM=128, VALUE_DIM=128)
options = dict(HAS_WINDOW=True, HAS_SOFTCAP=True, HAS_SINKS=True, PRECISION="ieee")
for arch in (80, 90):
    check(kernels.attend, arch, "bf16", {"out": "*fp32"}, TILE=16, STEP=64, SPLITS=8,
          DOT=tl.bfloat16, **sizes, **options)
check(kernels.attend, 90, "bf16", {}, TILE=64, STEP=64, SPLITS=1, DOT=tl.bfloat16,
      **sizes, **options)
check(kernels.attend, 80, "fp32", {}, TILE=16, STEP=32, SPLITS=1, DOT=tl.float32,
      HEAD_DIM=64, VALUE_DIM=64, **options)
check(kernels.combine, 80, "fp32", {"out": "*bf16"}, VALUE_DIM=128, SPLITS=8)
check(kernels.store, 80, "bf16", {}, HEADS=8, **sizes)
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """To machine code, products on tensor cores in half precision; the interpreter takes much that
    the compiler does not."""
    script = tmp_path / "check.py"  # the compiler reads sources from files
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(name, uses_mma) for name, _, _, uses_mma in lines] == [
        ("attend", "True"), ("attend", "True"), ("attend", "True"), ("attend", "False"),
        ("combine", "False"), ("store", "False"),
    ]  # fmt: skip
    shared = [int(num_bytes) for _, _, num_bytes, _ in lines]
    assert max(shared) <= 99 * 1024, "more shared memory than a multiprocessor of sm_86 has"
