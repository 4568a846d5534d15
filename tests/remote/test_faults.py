"""What a server can do wrong: nothing hangs, nothing is lost without a word, others go on."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from r2r_glimp.core import Prompt, RequestOutput, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair
from r2r_glimp.remote import client
from r2r_glimp.remote.breaker import Breaker
from tests.remote.fake import FakeServer, Handler

TOKEN = RoutingParams(granularity="token", router="random", threshold=0.3)
STEP = RoutingParams(granularity="step", router="random", threshold=1.0)
ALONE = RoutingParams(router="slm")
SAMPLING = SamplingParams(max_tokens=24, seed=3)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait a hundredth of what they do."""
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def prompts(prompts: list[Prompt]) -> list[Prompt]:
    """Fewer."""
    return prompts[:4]


def engine_of(connect: Callable[..., ModelPair], fake: FakeServer, **spec: Any) -> Engine:
    given = {"url": fake.url, "model": "m", "timeout_s": 0.5, "retries": 2, **spec}
    engine = Engine(connect(given), kv_memory="32MiB")
    fake.asked.clear()
    return engine


def run(engine: Engine, prompts: list[Prompt], routing: RoutingParams) -> list[RequestOutput]:
    """Every other request is routed; in no more than ten seconds."""
    started = time.monotonic()
    routings = [routing if i % 2 else ALONE for i in range(len(prompts))]
    outputs = engine.generate(prompts, [SAMPLING] * len(prompts), routings)
    assert time.monotonic() - started < 20
    engine.check_integrity()
    assert not engine.has_work
    assert all(pool.num_free == engine.kv.num_blocks for pool in engine.kv.pools)
    return outputs


def cut(handler: Handler) -> None:
    """Killed in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.close_connection = True


def slow(handler: Handler) -> None:
    time.sleep(1.5)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


FAULTS: dict[str, tuple[Callable[[Handler], Any], str]] = {
    "slow": (slow, "no answer within 0.5 s"),
    "429": (lambda h: h.say({}, 429, Retry_After="0.02"), "HTTP 429"),
    "500": (lambda h: h.say(b"oh\nno", 500), "HTTP 500 oh no"),
    "truncated JSON": (lambda h: h.say(b'{"choices": [{"te'), "what it answers is no JSON"),
    "no choices": (lambda h: h.say({"choices": []}), "what it answers is no completion"),
    "no JSON object": (lambda h: h.say([1]), "what it answers is no completion"),
    "wrong tokens": (lambda h: h.say(choice(token_ids=[10**6])), "the token id 1000000"),
    "many tokens": (lambda h: h.say(choice(token_ids=[5] * 600)), "600 tokens where"),
    "tokens of text": (lambda h: h.say(choice(token_ids=["a"])), "no token ids"),
    "killed": (cut, "cannot be used"),
    "hung up": (hang_up, "cannot be used"),
    "nothing written": (lambda h: h.say(choice(token_ids=[])), "wrote nothing"),
}


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"text": "", "finish_reason": "length", **fields}]}


@pytest.mark.parametrize("name", FAULTS)
def test_once_and_for_ever(
    name: str, connect: Callable[..., ModelPair], fake: FakeServer, prompts: list[Prompt]
) -> None:
    fault, message = FAULTS[name]
    engine = engine_of(connect, fake)
    right = run(engine, prompts, TOKEN)
    assert all(o.finish_reason in ("stop", "length") for o in right)
    assert sum(o.stats.llm_tokens for o in right) == len(fake.asked) > 5
    before = len(fake.asked)

    if name != "nothing written":  # a well-formed answer is not asked for twice
        fake.fault = lambda number: fault if number - before in (1, 4) else None
        again = run(engine, prompts, TOKEN)
        assert [o.text for o in again] == [o.text for o in right]
        assert len(fake.asked) == 2 * before + 2

    fake.fault = lambda number: fault
    outputs = run(engine, prompts, TOKEN)
    for i, output in enumerate(outputs):
        if i % 2 == 0:
            assert output.text == right[i].text  # others go on
        elif output.stats.deferrals:
            assert output.finish_reason == "error"
            assert output.error is not None and output.error.count("\n") == 0
            assert message in output.error or "is left alone" in output.error
    assert any(message in (o.error or "") for o in outputs)


@pytest.mark.parametrize("routing", [TOKEN, STEP], ids=["token", "step"])
def test_the_slm_goes_on_and_it_is_said(
    routing: RoutingParams,
    connect: Callable[..., ModelPair],
    fake: FakeServer,
    prompts: list[Prompt],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engine_of(connect, fake, on_failure="slm", retries=0)
    alone = engine.generate(prompts, SAMPLING, ALONE)
    fake.stop()
    outputs = run(engine, prompts, routing)
    # All is the SLM's, as if it had been alone.
    assert [o.text for o in outputs] == [o.text for o in alone]
    lost = [o for o in outputs if o.stats.llm_unavailable]
    assert lost and all(o.finish_reason == "llm_unavailable" for o in lost)
    assert all(o.stats.llm_tokens == 0 for o in outputs)
    [said] = [r.getMessage() for r in caplog.records if "goes on without" in r.getMessage()]
    assert "cannot be used: " in said


def test_it_comes_back(
    connect: Callable[..., ModelPair],
    fake: FakeServer,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(connect, fake, on_failure="slm", retries=0)
    remote: Any = engine.pair.llm
    now = [0.0]
    remote.client.breaker = Breaker(lambda: now[0])
    fake.fault = lambda number: FAULTS["500"][0]
    run(engine, prompts, TOKEN)
    assert 3 <= len(fake.asked) <= 6  # then nobody asks any more
    num_asked = len(fake.asked)
    run(engine, prompts, TOKEN)
    assert len(fake.asked) == num_asked
    fake.fault, now[0] = None, 100.0
    outputs = run(engine, prompts, TOKEN)
    assert sum(o.stats.llm_tokens for o in outputs) > 0
    assert engine.generate(prompts, SAMPLING, TOKEN)[1].finish_reason in ("stop", "length")


def test_a_breaker_opens_tries_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for _ in range(3):
        assert breaker.wait_s() is None
        breaker.fail()
    assert breaker.wait_s() == 2.0
    now[0] = 2.5
    assert breaker.wait_s() is None  # one may try,
    assert breaker.wait_s() == 0.0  # and no second one
    breaker.fail()
    assert breaker.wait_s() == 4.0
    now[0] = 7.0
    assert breaker.wait_s() is None
    breaker.leave()
    assert breaker.wait_s() is None
    breaker.succeed()
    assert breaker.wait_s() is None and breaker.wait_s() is None


def test_an_abort_does_not_wait(
    connect: Callable[..., ModelPair], fake: FakeServer, prompts: list[Prompt]
) -> None:
    engine = engine_of(connect, fake, timeout_s=30.0)
    fake.latency_s = 1.0
    request = engine.add_request(prompts[0], SAMPLING, RoutingParams(router="llm"))
    while not fake.asked:
        engine.step()
    started = time.monotonic()
    engine.abort(request)
    [event] = engine.step()
    assert time.monotonic() - started < 0.5 and event.output.finish_reason == "abort"  # type: ignore[union-attr]
    engine.check_integrity()


def test_others_are_not_kept_waiting(
    connect: Callable[..., ModelPair], fake: FakeServer, prompts: list[Prompt]
) -> None:
    """While one waits for its server, the ticks of the others go on."""
    engine = engine_of(connect, fake, timeout_s=30.0)
    fake.latency_s = 1.0
    engine.add_request(prompts[0], SAMPLING, RoutingParams(router="llm"))
    engine.step()
    engine.add_request(prompts[1], SAMPLING, ALONE)
    written, started = 0, time.monotonic()
    while written < 20:
        written += len([e for e in engine.step() if e.request_id == "request-1"])
    assert time.monotonic() - started < 1.0
    assert engine.running[0].pending is not None
    for name in ("request-0", "request-1"):
        engine.abort(name)


def test_many_wait_at_once(
    connect: Callable[..., ModelPair], fake: FakeServer, prompts: list[Prompt]
) -> None:
    engine = engine_of(connect, fake, timeout_s=30.0)
    fake.latency_s = 0.2
    started = time.monotonic()
    sampling = SamplingParams(max_tokens=3, n=16, ignore_eos=True)
    outputs = engine.generate(prompts[0], sampling, RoutingParams(router="llm"))
    assert len(outputs) == 16 and len(fake.asked) == 48
    assert time.monotonic() - started < 16 * 0.2
