"""Passes of fixed shape give what ragged passes give, for every shape, token by token."""

import logging
import random
from array import array
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import Model, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.graphs import MAX_TOKENS, NEW, Body, Draws, FixedPass, Graphs, obstacle
from r2r_glimp.engine.runner import ModelRunner
from r2r_glimp.engine.sampling import sample
from r2r_glimp.models import LoadedModel, ModelPair
from r2r_glimp.routing.features import FeatureSpec
from r2r_glimp.routing.mlp import MLPConfig, MLPRouter, MLPRouterNet, MLPSize, Threshold
from r2r_glimp.routing.routers import (
    EntropyRouter,
    MarginRouter,
    RandomRouter,
    ReplayRouter,
    named_router,
)
from r2r_glimp.routing.signals import Signals
from tests.engine.fixed import run_as_it_is, run_uncaptured, uncaptured
from tests.tiny import ARCHITECTURES, make_tiny_model

GREEDY, HOT = SamplingParams(), SamplingParams(temperature=1.3, top_p=0.9, top_k=40, seed=3)


def mlp_router(hidden_size: int, hidden_layer: int | None = None) -> MLPRouter:
    torch.manual_seed(0)
    features = FeatureSpec(hidden_size=hidden_size, top_k_logits=8, hidden_layer=hidden_layer)
    net = MLPRouterNet(MLPConfig(granularity="token", features=features, size=MLPSize(width=16)))
    return MLPRouter(net, {"default": Threshold(value=0.5, calibrated_on="nothing")}, "default")


ROUTERS = {
    "entropy": EntropyRouter,
    "entropy_top_k": lambda: EntropyRouter(top_k=5),
    "margin": MarginRouter,
    "random": RandomRouter,
    "mlp": lambda: mlp_router(32),
    "mlp_of_a_layer": lambda: mlp_router(32, hidden_layer=1),
}


@pytest.fixture
def runner(tokenizer: PreTrainedTokenizerFast) -> ModelRunner:
    """A tiny model with something in every block."""
    model = make_tiny_model("qwen3", tokenizer, seed=7)
    runner = ModelRunner(LoadedModel.from_model(model, tokenizer), "torch")
    runner.allocate(num_blocks=200)
    assert runner.backend is not None
    for plane in runner.backend.keys + runner.backend.values:
        plane[:, 16:] = torch.randn(plane[:, 16:].shape)
    return runner


def random_rows(sizes: list[int], rng: random.Random) -> list[Row]:
    """Rows of so many new tokens behind earlier ones, in scattered blocks."""
    free = rng.sample(range(1, 201), 200)
    rows = []
    for new in sizes:
        start = rng.choice([0, 1, 15, 16, 40])
        num_blocks = -(-(start + new) // 16)
        tokens = [rng.randrange(5, 300) for _ in range(new)]
        rows.append(Row(tokens, start, array("i", free[:num_blocks])))
        free = free[num_blocks:]
    return rows


def draws_for(rows: list[Row], params: SamplingParams) -> Draws:
    rng = random.Random(len(rows))
    n = len(rows)
    # every other row is greedy, so that both kinds meet in one pass
    mixed = [params if i % 2 == 0 else GREEDY for i in range(n)]
    return Draws(mixed, [rng.random() for _ in rows], [rng.random() for _ in rows])


@pytest.mark.parametrize("params", [GREEDY, HOT], ids=["greedy", "drawn"])
@pytest.mark.parametrize("num_new", NEW)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 8, 12])
def test_a_pass_of_every_shape_equals_a_ragged_one(
    num_rows: int, num_new: int, params: SamplingParams, runner: ModelRunner
) -> None:
    rng = random.Random(num_rows * 100 + num_new)
    router = EntropyRouter()
    graphs = uncaptured(runner, max_rows=12, max_length=512, router=router)
    lengths = [1, *(rng.randint(1, num_new) for _ in range(num_rows - 2)), num_new][-num_rows:]
    rows = random_rows(lengths, rng)
    wanted = [int(rng.random() < 0.8) for _ in rows]
    draws = draws_for(rows, params)
    fixed = graphs.run(rows, wanted, draws)
    if num_new * next(size for size in graphs.sizes if num_rows <= size) > MAX_TOKENS:
        assert fixed is None
        return
    assert fixed is not None and fixed.drawn is not None
    expected = runner.forward(rows, wanted)
    assert torch.allclose(fixed.logits_RV, expected.logits_RV, atol=1e-4)
    assert torch.allclose(fixed.hidden_RH, expected.hidden_RH, atol=1e-4)
    asked = [i for i, num in enumerate(wanted) if num]
    tokens = sample(
        expected.logits_RV, [draws.params[i] for i in asked], [draws.uniforms[i] for i in asked]
    )
    assert fixed.drawn.tokens == tokens
    assert fixed.drawn.finite == [True] * len(asked)
    assert fixed.drawn.router is (router if num_new == 1 else None)
    if num_new == 1:
        scores = router.score(
            Signals(
                expected.hidden_RH, expected.logits_RV, torch.tensor(tokens), [0] * len(asked), []
            )
        )
        assert fixed.drawn.scores == pytest.approx(scores.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", [f for f in ARCHITECTURES if f not in ("falcon", "bloom")])
def test_a_pass_under_every_architecture(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = LoadedModel.from_model(make_tiny_model(family, tokenizer, seed=7), tokenizer)
    runner = ModelRunner(loaded, "torch")
    runner.allocate(num_blocks=200)
    tables = [array("i", [3, 9]), array("i", [4, 1])]
    prompts = [[7, 8, 9, 10, 11], [12, 13, 14]]
    runner.forward([Row(p, 0, t) for p, t in zip(prompts, tables, strict=True)], [0, 0])
    rows = [Row([20, 21, 22], 5, tables[0]), Row([23], 3, tables[1])]
    fixed = uncaptured(runner, 3, 512).run(rows, [1, 1], draws_for(rows, GREEDY))
    assert fixed is not None
    assert torch.allclose(fixed.logits_RV, runner.forward(rows, [1, 1]).logits_RV, atol=1e-4)


def test_several_wanted_rows_come_without_a_draw(runner: ModelRunner) -> None:
    rows = random_rows([4, 3, 1], random.Random(0))
    fixed = uncaptured(runner, 4, 512).run(rows, [3, 0, 1], draws_for(rows, GREEDY))
    assert fixed is not None and fixed.drawn is None
    expected = runner.forward(rows, [3, 0, 1])
    assert torch.allclose(fixed.logits_RV, expected.logits_RV, atol=1e-4)


def test_what_fits_no_shape_is_left_to_ragged_passes(runner: ModelRunner) -> None:
    graphs = uncaptured(runner, max_rows=4, max_length=48)
    rng = random.Random(0)

    def fits(rows: list[Row]) -> bool:
        return graphs.run(rows, [1] * len(rows), draws_for(rows, GREEDY)) is not None

    assert fits(random_rows([1] * 4, rng))
    assert not fits(random_rows([1] * 5, rng)), "more rows than the largest shape"
    assert not fits(random_rows([65], rng)), "more new tokens than the longest shape"
    assert not fits([Row([9], 48, array("i", [1, 2, 3, 4]))]), "longer than the tables"


def test_padding_leaves_the_null_block_and_others_alone(runner: ModelRunner) -> None:
    assert runner.backend is not None
    graphs = uncaptured(runner, max_rows=8, max_length=512)
    before = [plane.clone() for plane in runner.backend.keys]
    row = Row([9], 20, array("i", [5, 6]))
    graphs.run([row], [1], draws_for([row], GREEDY))
    for old, new in zip(before, runner.backend.keys, strict=True):
        changed = ~((old == new) | (old.isnan() & new.isnan())).all(-1).all(0)
        assert changed.nonzero().flatten().tolist() == [6 * 16 + 4]
        assert (new[:, :16] == 0).all()


def test_nan_is_told_row_by_row(runner: ModelRunner) -> None:
    graphs = uncaptured(runner, max_rows=4, max_length=512)
    rows = random_rows([1, 1, 1], random.Random(1))
    with torch.no_grad():
        runner.model.get_input_embeddings().weight[400] = torch.nan
    rows[1].tokens[0] = 400
    fixed = graphs.run(rows, [1, 1, 1], draws_for(rows, GREEDY))
    assert fixed is not None and fixed.drawn is not None
    assert fixed.drawn.finite == [True, False, True]


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts fixed passes by (rows, new tokens, drawn, router's name)."""
    seen: Counter = Counter()
    run = FixedPass.run

    def counted(self: FixedPass, *args: object) -> object:
        router = self.router
        seen[self.shape.num_rows, self.shape.num_new, self.shape.drawn, router and router.name] += 1
        return run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FixedPass, "run", counted)
    return seen


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("num_requests", [1, 3, 6])
def test_an_engine_writes_the_same_tokens(
    name: str,
    num_requests: int,
    engine_pair: ModelPair,
    words: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(num_requests)
    prompts = [[rng.choice(words) for _ in range(rng.randint(1, 30))] for _ in range(num_requests)]
    samplings = [
        SamplingParams(max_tokens=25, temperature=rng.choice([0.0, 1.0]), seed=i, ignore_eos=True)
        for i in range(num_requests)
    ]
    router = ROUTERS[name]()
    routing = RoutingParams(granularity="token", threshold=0.5, trace=True)
    expected = Engine(engine_pair, kv_memory="1MiB", router=router).generate(
        prompts, samplings, routing
    )
    run_uncaptured(monkeypatch)
    seen = counting(monkeypatch)
    engine = Engine(engine_pair, kv_memory="1MiB", router=router, max_batch=num_requests)
    got = engine.generate(prompts, samplings, routing)
    for one, other in zip(got, expected, strict=True):
        assert (one.token_ids, one.sources) == (other.token_ids, other.sources)
        assert [d.score is None for d in one.trace or ()] == [
            d.score is None for d in other.trace or ()
        ]
        assert [d.score for d in one.trace or () if d.score is not None] == pytest.approx(
            [d.score for d in other.trace or () if d.score is not None], abs=1e-4
        )
    scored = sum(n for (_, new, _, scorer), n in seen.items() if scorer == router.name and new == 1)
    assert scored >= 20, "SLM ticks were not passes of fixed shape"
    assert any(scorer is None for *_, scorer in seen), "LLM passes were not of fixed shape"


def test_speculation_runs_on_fixed_shapes(
    engine_pair: ModelPair, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=1)
    routing = RoutingParams(router="llm", speculate=3)
    wanted = Engine(engine_pair, kv_memory="1MiB").generate([words[:5]], sampling, routing)
    run_uncaptured(monkeypatch)
    seen = counting(monkeypatch)
    got = Engine(engine_pair, kv_memory="1MiB").generate([words[:5]], sampling, routing)
    assert got[0].token_ids == wanted[0].token_ids
    drafts = [(o.stats.draft_tokens, o.stats.draft_accepted) for o in (*got, *wanted)]
    assert drafts[0] == drafts[1], "drafts are drawn with other numbers"
    assert {new for _, new, *_ in seen} >= {1, 4}


def test_a_router_that_reads_back_is_scored_outside(
    engine_pair: ModelPair,
    words: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    router = ReplayRouter([3, 4, 11])
    run_uncaptured(monkeypatch)
    seen = counting(monkeypatch)
    output = Engine(engine_pair, kv_memory="1MiB", router=router).generate([words[:5]], sampling)[0]
    assert [i for i, source in enumerate(output.sources) if source == "llm"] == [3, 4, 11]
    assert {scorer for *_, scorer in seen} == {None}
    assert sum(seen.values()) >= 20, "the SLM's passes were not of fixed shape"
    assert not caplog.records


@pytest.mark.parametrize("name", ["slm", "llm", "replay"])
def test_only_routers_of_tensors_say_that_they_can_be_captured(name: str) -> None:
    router = ReplayRouter([]) if name == "replay" else named_router(name)
    assert not router.capturable


def test_a_model_that_cannot_be_captured_runs_ragged_and_says_so(
    runner: ModelRunner, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(body: Body) -> Body:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphs = Graphs(runner, lambda tensors: None, 4, 512, refuse)  # type: ignore[arg-type, return-value]
    rows = random_rows([1, 1], random.Random(0))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert graphs.run(rows, [1, 1], draws_for(rows, GREEDY)) is None
    assert [r.getMessage() for r in caplog.records] == [
        "in-memory runs without CUDA graphs and is slower: a pass of 2 rows x 1 tokens cannot be "
        "captured (operation not permitted when stream is capturing)"
    ]


def test_what_the_config_forbids_to_capture(
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert obstacle(LoadedModel.from_model(make_tiny_model("llama", tokenizer), tokenizer)) is None
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_tiny_model("llama", tokenizer, rope_parameters=rope)
    loaded = LoadedModel.from_model(model, tokenizer, name="stretched")
    assert "rope_type dynamic" in (obstacle(loaded) or "")
    run_uncaptured(monkeypatch)
    with caplog.at_level(logging.WARNING):
        engine = Engine(ModelPair(slm=loaded, llm=loaded), kv_memory="1MiB")
    assert "stretched runs without CUDA graphs and is slower" in caplog.text
    assert engine.tick.passes.graphs == (None, None)


def test_a_layer_asked_for_later_makes_new_passes(runner: ModelRunner) -> None:
    graphs = uncaptured(runner, 2, 512)
    rows = random_rows([1], random.Random(0))
    first = graphs.run(rows, [1], draws_for(rows, GREEDY))
    assert first is not None and not first.layers
    runner.keep_layer(1)
    second = graphs.run(rows, [1], draws_for(rows, GREEDY))
    assert second is not None and list(second.layers) == [1]
    assert torch.allclose(second.layers[1], runner.forward(rows, [1]).layers[1], atol=1e-5)


def test_warm_up_captures_the_largest_shapes_first(runner: ModelRunner) -> None:
    captured: list[tuple[int, int]] = []

    def capture(body: Body) -> Body:
        shape = body.__self__.shape  # type: ignore[attr-defined]
        captured.append((shape.num_rows, shape.num_new))
        return run_as_it_is(body)

    graphs = uncaptured(runner, 6, 512)
    graphs.capture = capture
    graphs.warm_up()
    sizes = [rows * new for rows, new in captured]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(captured) == sorted(
        (rows, new) for rows in (1, 2, 4, 6) for new in NEW if rows * new <= MAX_TOKENS
    )


def test_both_roles_played_by_one_model(
    make_pair, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slm = make_pair().slm
    run_uncaptured(monkeypatch)
    engine = Engine(ModelPair(slm=slm, llm=slm), kv_memory="1MiB", router=RandomRouter())
    assert engine.runners[Model.SLM] is engine.runners[Model.LLM]
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, seed=0)
    routed, alone = (
        engine.generate([words[:4]], sampling, RoutingParams(router=router, threshold=0.5))[0]
        for router in (None, "slm")
    )
    assert {*routed.sources} == {"slm", "llm"}
    assert routed.token_ids == alone.token_ids


def test_an_engine_warms_up_and_names_its_path(
    engine_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "CUDA graphs" not in Engine(engine_pair, kv_memory="1MiB").runners[0].paths
    run_uncaptured(monkeypatch)
    router = MarginRouter()
    engine = Engine(engine_pair, kv_memory="1MiB", max_batch=3, router=router)
    assert engine.runners[0].paths.endswith(", CUDA graphs for up to 3 rows")
    slm, llm = engine.tick.passes.graphs
    assert slm is not None and llm is not None
    assert (slm.router, llm.router) == (router, None)
    assert {(s.num_rows, s.num_new) for s in slm.passes} == {(rows, 1) for rows in (1, 2, 3)}
    assert {(s.num_rows, s.num_new) for s in llm.passes} == {
        (rows, new) for rows in (1, 2, 3) for new in NEW
    }
    off = Engine(engine_pair, kv_memory="1MiB", graphs=False)
    assert off.tick.passes.graphs == (None, None)
