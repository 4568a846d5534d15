"""The engine equals the cache-free reference, whatever the batch, the pool and the options."""

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r2r_glimp.core import FinishEvent, RequestOutput, RoutingParams, SamplingParams, TokenEvent
from r2r_glimp.engine.engine import Engine
from r2r_glimp.kv.pool import BLOCK_SIZE
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.routers import (
    EntropyRouter,
    MarginRouter,
    RandomRouter,
    ReplayRouter,
    Router,
    named_router,
)
from tests.engine import reference

BYTES_PER_TOKEN = 2 * (2 * 2 * 2 * 8 * 4)  # models x (K and V, layers, heads, head size, float32)

sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1.0, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 4]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
    max_tokens=st.sampled_from([1, 8, 30, 60]),
    stop=st.sampled_from([(), (), (" hats 4",), (" 4Sum", "\n\nSum")]),
    ignore_eos=st.booleans(),
)
routing_params = st.builds(
    RoutingParams,
    granularity=st.sampled_from(["token", "step"]),
    threshold=st.sampled_from([None, 0.3, 0.9, 1.5]),
    answer_by=st.sampled_from([None, "slm", "llm", "router"]),
    delimiter=st.sampled_from(["blank_line", "blank_line", "newline"]),
    max_step_tokens=st.sampled_from([3, 10, 512]),
    max_thinking_tokens=st.sampled_from([None, 5, 25]),
    max_llm_share=st.sampled_from([None, None, 0.0, 0.2, 0.5, 1.0]),
    repetition_guard=st.sampled_from([None, True, False]),
    trace=st.booleans(),
)
speculations = st.sampled_from([0, 0, 1, 3, 8])
routers = st.one_of(
    st.sampled_from(["slm", "llm", "entropy", "margin", "random"]).map(named_router),
    st.just(EntropyRouter(top_k=5)),
    st.just(MarginRouter()),
    st.just(RandomRouter()),
    st.sets(st.integers(0, 40), max_size=15).map(ReplayRouter),
)


@dataclass
class Request:
    words: list[int]  # indices into the babblers' vocabulary
    shares_prefix: bool
    ending: str
    sampling: SamplingParams
    routing: RoutingParams
    router: Router
    abort_after: int | None
    speculate: int


requests = st.builds(
    Request,
    words=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    shares_prefix=st.booleans(),
    ending=st.sampled_from(["preamble", "thinking", "thinking", "answer"]),
    sampling=sampling_params,
    routing=routing_params,
    router=routers,
    abort_after=st.sampled_from([None] * 8 + [1, 7]),
    speculate=speculations,
)


@settings(suppress_health_check=list(HealthCheck))
@given(
    batch=st.lists(requests, min_size=1, max_size=6),
    prefix=st.lists(st.integers(0, 7), min_size=0, max_size=40),
    num_blocks=st.sampled_from([8, 9, 12, 100]),
    max_batch=st.sampled_from([1, 3, 8]),
    max_batch_tokens=st.sampled_from([1, 5, 16, 2048]),
    llm_min_batch=st.sampled_from([None, None, 1, 2, 4]),
    prefix_cache=st.booleans(),
)
def test_engine_equals_reference(
    path_pair: ModelPair,
    plain_pair: ModelPair,
    words: list[int],
    batch: list[Request],
    prefix: list[int],
    num_blocks: int,
    max_batch: int,
    max_batch_tokens: int,
    llm_min_batch: int | None,
    prefix_cache: bool,
) -> None:
    engine = Engine(
        path_pair,
        kv_memory=num_blocks * BLOCK_SIZE * BYTES_PER_TOKEN,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        llm_min_batch=llm_min_batch,
        prefix_cache=prefix_cache,
    )
    tokenizer = plain_pair.slm.tokenizer
    endings = {
        "preamble": "<|im_start|>",
        "thinking": "<|im_start|><think>\n",
        "answer": "<|im_start|><think></think>",
    }
    prompts = [
        [words[i] for i in (prefix if request.shares_prefix else []) + request.words]
        + tokenizer.encode(endings[request.ending])
        for request in batch
    ]
    order = {}
    for i, (prompt, request) in enumerate(zip(prompts, batch, strict=True)):
        routing = _with_router(request)
        order[engine.add_request(prompt, request.sampling, routing)] = i

    outputs: dict[int, RequestOutput] = {}
    streamed = [""] * len(batch)
    written = [0] * len(batch)
    while engine.has_work:
        for event in engine.step():
            i = order[event.request_id]
            if isinstance(event, TokenEvent):
                streamed[i] += event.text
                written[i] += 1
            else:
                outputs[i] = event.output
        engine.check_integrity()
        for request_id, i in order.items():
            if batch[i].abort_after is not None and written[i] >= batch[i].abort_after:
                engine.abort(request_id)
    for event in engine.step():
        assert isinstance(event, FinishEvent)
        outputs[order[event.request_id]] = event.output
    engine.check_integrity()
    assert engine.kv.pools[0].num_free == engine.kv.num_blocks, "blocks left behind"

    for i, (prompt, request) in enumerate(zip(prompts, batch, strict=True)):
        output = outputs[i]
        _check_once(output)
        if output.finish_reason == "abort":
            continue
        assert streamed[i] == output.text
        expected = reference.generate(
            plain_pair, prompt, request.sampling, request.routing, request.router, request.ending,
            seed=request.sampling.seed or 0, room=engine.kv.capacity,
        )  # fmt: skip
        assert (output.token_ids, output.sources) == (expected.token_ids, expected.sources)
        assert (output.text, output.finish_reason) == (expected.text, expected.finish_reason)
        if output.trace is not None:
            decisions = [(d.position, d.deferred) for d in output.trace if d.score is not None]
            assert decisions == [
                (position, deferred) for position, _, deferred in expected.decisions
            ]


def _with_router(request: Request) -> RoutingParams:
    values = {name: getattr(request.routing, name) for name in RoutingParams.__slots__}
    speculate = 0 if request.routing.trace else request.speculate
    return RoutingParams(**values | {"router": request.router, "speculate": speculate})


def _check_once(output: RequestOutput) -> None:
    """Each model computes each token at most once, save for preemption; one that is never called
    computes nothing."""
    stats = output.stats
    longest = len(output.prompt_token_ids) + len(output.token_ids)
    if not stats.preemptions and stats.draft_tokens == stats.draft_accepted:
        assert stats.slm_computed <= longest
        assert stats.llm_computed <= longest
    if not stats.llm_tokens and output.finish_reason != "abort":
        assert stats.llm_computed == 0
