"""The engine's public behaviour: events, stops, limits, sharing, waiting, and what it refuses."""

import logging

import pytest

from r2r_glimp.core import (
    DataError,
    FinishEvent,
    RoutingParams,
    SamplingParams,
    TokenEvent,
    UsageError,
)
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.routers import ReplayRouter

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True, seed=0)
THINK = "<|im_start|>assistant\n<think>\n"


@pytest.fixture
def engine(engine_pair: ModelPair) -> Engine:
    return Engine(engine_pair, kv_memory="2MiB")


def test_outputs_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    prompts = ["Sum", " hats 4", "Sum hats"]
    together = engine.generate(prompts, GREEDY, RoutingParams(router="slm"))
    alone = [engine.generate(p, GREEDY, RoutingParams(router="slm"))[0] for p in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]


def test_each_prompt_may_have_parameters_of_its_own(engine: Engine) -> None:
    sampling = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 5)]
    routing = [RoutingParams(router="slm"), RoutingParams(router="llm")]
    outputs = engine.generate(["Sum", "Sum"], sampling, routing)
    assert [(len(o.token_ids), o.sources[0]) for o in outputs] == [(3, "slm"), (5, "llm")]
    with pytest.raises(UsageError, match="2 entries for 1 prompts"):
        engine.generate(["Sum"], sampling)


def test_a_prompt_is_text_messages_or_token_ids(engine: Engine) -> None:
    tokenizer = engine.pair.slm.tokenizer
    messages = [{"role": "user", "content": "Say hats 4."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    outputs = [engine.generate(prompt, GREEDY)[0] for prompt in (messages, text, ids)]
    assert {tuple(o.prompt_token_ids) for o in outputs} == {tuple(ids)}
    assert len({o.text for o in outputs}) == 1


def test_stream_tells_the_same_as_generate(engine: Engine) -> None:
    routing = RoutingParams(router="random", threshold=0.4)
    sampling = SamplingParams(max_tokens=30, temperature=1.0, seed=5)
    events = list(engine.stream("Sum hats", sampling, routing))
    output = engine.generate("Sum hats", sampling, routing)[0]
    tokens = [e for e in events if isinstance(e, TokenEvent)]
    assert [e.token_id for e in tokens] == output.token_ids
    assert [e.source for e in tokens] == output.sources
    assert "".join(e.text for e in tokens) == output.text
    assert isinstance(events[-1], FinishEvent) and events[-1].output.text == output.text


def test_closing_a_stream_aborts_its_request(engine: Engine) -> None:
    stream = engine.stream("Sum", GREEDY)
    next(stream)
    stream.close()
    assert not engine.has_work
    engine.check_integrity()
    assert engine.kv.pools[0].num_free == engine.kv.num_blocks


def test_a_keyboard_interrupt_leaves_nothing_behind(engine: Engine) -> None:
    def interrupt(output: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(["Sum", " hats"] * 4, GREEDY, on_finish=interrupt)
    assert not engine.has_work
    assert engine.step() == []


def test_n_completions_differ_and_are_reproducible(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=1.5, seed=3, n=4)
    first = engine.generate("Sum", sampling)
    again = engine.generate("Sum", sampling)
    assert [o.index for o in first] == [0, 1, 2, 3]
    assert [o.text for o in first] == [o.text for o in again]
    assert len({o.text for o in first}) > 1
    alone = engine.generate("Sum", SamplingParams(max_tokens=20, temperature=1.5, seed=3))[0]
    assert alone.text == first[0].text


def test_a_stop_string_cuts_the_text_and_is_never_streamed(engine: Engine) -> None:
    routing = RoutingParams(router="llm")
    full = engine.generate("Sum", SamplingParams(max_tokens=30, ignore_eos=True), routing)[0].text
    stop = full[9:14]
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,))
    events = list(engine.stream("Sum", sampling, routing))
    output = events[-1].output  # type: ignore[union-attr]
    assert output.finish_reason == "stop"
    assert output.text == full[: full.index(stop)]
    assert "".join(e.text for e in events if isinstance(e, TokenEvent)) == output.text


def test_max_tokens_and_context_end_with_length(engine: Engine) -> None:
    output = engine.generate("Sum", SamplingParams(max_tokens=7, ignore_eos=True))[0]
    assert (len(output.token_ids), output.finish_reason) == (7, "length")
    long = engine.generate(
        [8] * 500, SamplingParams(max_tokens=None, ignore_eos=True), RoutingParams(router="slm")
    )[0]
    assert (len(long.token_ids), long.finish_reason) == (12, "length")


def test_logprobs_are_the_writers_own(engine: Engine, plain_pair: ModelPair) -> None:
    import torch

    routing = RoutingParams(router="random", threshold=0.5, granularity="token")
    sampling = SamplingParams(max_tokens=12, logprobs=2, ignore_eos=True, seed=1)
    output = engine.generate([8, 9, 10], sampling, routing)[0]
    assert output.logprobs is not None and set(output.sources) == {"slm", "llm"}
    for i, (source, logprob) in enumerate(zip(output.sources, output.logprobs, strict=True)):
        model = plain_pair.llm if source == "llm" else plain_pair.slm
        ids = torch.tensor([[8, 9, 10, *output.token_ids[:i]]])
        with torch.inference_mode():
            expected = model.model(ids).logits[0, -1].log_softmax(-1)
        assert logprob.token == output.token_ids[i]
        assert logprob.logprob == pytest.approx(expected[logprob.token].item(), abs=1e-4)
        assert logprob.top[0][1] == pytest.approx(expected.max().item(), abs=1e-4)


def test_the_prefix_cache_serves_both_models(engine: Engine) -> None:
    prompt = [8, 9] * 40
    routing = RoutingParams(router="random", threshold=0.5, granularity="token")
    cold = engine.generate([prompt], GREEDY, routing)[0].stats
    warm = engine.generate([prompt], GREEDY, routing)[0].stats
    assert cold.prefix_hits == 0 and warm.prefix_hits == 64
    assert warm.slm_computed == cold.slm_computed - 64
    assert warm.llm_computed == cold.llm_computed - 64


def test_tiny_pools_force_preemption_and_change_nothing(engine_pair: ModelPair) -> None:
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, seed=4, temperature=1.0)
    routing = RoutingParams(router="random", threshold=0.4, granularity="token")
    prompts = [[8 + i] * (5 + 3 * i) for i in range(8)]
    roomy = Engine(engine_pair, kv_memory="2MiB").generate(prompts, sampling, routing)
    engine = Engine(engine_pair, kv_memory="64KiB")  # 8 blocks; every request needs 5 or 6
    tight = engine.generate(prompts, sampling, routing)
    assert sum(output.stats.preemptions for output in tight) > 0
    assert sum(output.stats.preemptions for output in roomy) == 0
    assert [o.token_ids for o in tight] == [o.token_ids for o in roomy]
    engine.check_integrity()


def test_a_model_that_is_never_called_computes_nothing(engine: Engine) -> None:
    slm, llm = (
        engine.generate("Sum", GREEDY, RoutingParams(router=name))[0].stats
        for name in ("slm", "llm")
    )
    assert slm.llm_computed == 0 and slm.llm_tokens == 0
    assert llm.slm_computed == 0 and llm.slm_tokens == 0


def test_a_kept_step_is_not_decoded_twice(engine: Engine) -> None:
    """GlimpRouter decodes the probe again; here the probe is the step's first token."""
    routing = RoutingParams(granularity="step", router="entropy", threshold=100.0, answer_by="slm")
    stats = engine.generate(THINK, GREEDY, routing)[0].stats
    prompt = len(engine.pair.slm.tokenizer.encode(THINK))
    assert stats.decisions > 1 and stats.deferrals == 0
    assert stats.slm_computed == prompt + 24 - 1


def test_replay_repeats_a_trace(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=11, ignore_eos=True)
    for granularity in ("token", "step"):
        routing = RoutingParams(granularity=granularity, router="random", threshold=0.4, trace=True)
        first = engine.generate(THINK, sampling, routing)[0]
        assert first.trace is not None
        replayed = engine.generate(
            THINK,
            sampling,
            RoutingParams(granularity=granularity, router=ReplayRouter(first.trace)),
        )[0]
        assert (replayed.token_ids, replayed.sources) == (first.token_ids, first.sources)


def test_traces_carry_the_llms_own_choice_for_free(engine: Engine, plain_pair: ModelPair) -> None:
    import torch

    routing = RoutingParams(granularity="token", router="random", threshold=0.3, trace=True)
    plain = RoutingParams(granularity="token", router="random", threshold=0.3)
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, seed=2)
    output = engine.generate([8, 9, 10], sampling, routing)[0]
    assert output.trace is not None and len(output.trace) == 30
    labeled = [d for d in output.trace if d.llm_token is not None]
    assert len(labeled) > 10 and all(d.source == "slm" for d in labeled)
    for decision in labeled:
        ids = torch.tensor([[8, 9, 10, *output.token_ids[: decision.position]]])
        with torch.inference_mode():
            assert decision.llm_token == plain_pair.llm.model(ids).logits[0, -1].argmax().item()
    # Free: a run without a trace computes as much.
    engine2 = Engine(engine.pair, kv_memory="2MiB")
    assert (
        engine2.generate([8, 9, 10], sampling, plain)[0].stats.llm_computed
        == output.stats.llm_computed
    )


def test_the_llm_waits_for_a_batch(engine_pair: ModelPair) -> None:
    """Rows wait until enough of them do, the oldest has waited long enough, or nothing else can
    run."""
    calls: list[int] = []
    engine = Engine(engine_pair, kv_memory="2MiB", llm_min_batch=3, llm_max_wait=100)
    forward = engine.runners[1].forward

    def counted(rows, wanted):  # type: ignore[no-untyped-def]
        calls.append(len(rows))
        return forward(rows, wanted)

    engine.runners[1].forward = counted  # type: ignore[method-assign]
    routing = RoutingParams(granularity="token", router="random", threshold=0.3)
    engine.generate(
        [[8], [9], [10], [8, 9]], SamplingParams(max_tokens=40, ignore_eos=True, seed=1), routing
    )
    assert max(calls) >= 3
    del engine.runners[1].forward  # type: ignore[misc]


THOUGHTS = [THINK + start for start in ("", "Sum", " hats", " 4", "!", "Sum hats")]


def test_two_tags_never_stand_in_one_text(engine: Engine) -> None:
    """A prompt that opens the thinking is not opened again, and what is closed by force is closed
    once."""
    routing = RoutingParams(granularity="step", max_thinking_tokens=3)
    sampling = SamplingParams(max_tokens=24, temperature=1.0, seed=0)
    outputs = engine.generate(THOUGHTS, sampling, routing)
    tag = engine.pair.slm.tokenizer.convert_tokens_to_ids("<think>")
    # A babbler may write a tag of its own; that is none of the engine's.
    forced = [o for o in outputs if o.stats.forced_tokens and tag not in o.token_ids[:3]]
    assert len(forced) >= 2
    for output in forced:
        thinking = output.text.partition("</think>")[0]
        assert "<think>" not in thinking
        assert len(output.token_ids) == 24 or output.finish_reason == "stop"
        assert output.sources[-1] == "llm"  # the answer is the LLM's


def test_a_missing_delimiter_is_said_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    routing = RoutingParams(granularity="step", delimiter="regex:never", max_step_tokens=3)
    with caplog.at_level(logging.WARNING):
        engine.generate(THOUGHTS, GREEDY, routing)
    assert len([r for r in caplog.records if "without a step delimiter" in r.message]) == 1


@pytest.mark.parametrize(
    ("prompt", "sampling", "routing", "message"),
    [
        ("", {}, {}, "empty"),
        ([], {}, {}, "empty"),
        ([10**6], {}, {}, "token ids must be"),
        ([8] * 600, {}, {}, "600 tokens, the SLM's context only 512"),
        ("\ud800", {}, {}, "not valid Unicode"),
        ([{"role": "user"}], {}, {}, "role"),
        ("Sum", {}, {"router": "nope"}, "unknown router 'nope'"),
        ("Sum", {}, {"delimiter": "nope"}, "unknown delimiter"),
        ("Sum", {}, {"delimiter": "regex:("}, "not a regular expression"),
        ("Sum", {}, {"delimiter": "regex:a*"}, "empty string"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    engine: Engine, prompt, sampling: dict, routing: dict, message: str
) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        engine.add_request(prompt, SamplingParams(**sampling), RoutingParams(**routing))
    assert not engine.has_work


def test_one_bad_prompt_among_many_runs_none(engine: Engine) -> None:
    with pytest.raises(DataError, match="empty"):
        engine.generate(["Sum", ""], GREEDY)
    assert not engine.has_work


def test_kv_memory_that_is_too_small_says_so(engine_pair: ModelPair) -> None:
    with pytest.raises(UsageError, match="too small: one block"):
        Engine(engine_pair, kv_memory=100)
    engine = Engine(engine_pair, kv_memory="32KiB")
    with pytest.raises(UsageError, match="too small for one request"):
        engine.add_request("Sum", SamplingParams(max_tokens=400))


@pytest.mark.parametrize("size", ["1GiB ram", "-1", "GiB", "1XB"])
def test_kv_memory_must_be_a_size(engine_pair: ModelPair, size: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        Engine(engine_pair, kv_memory=size)
