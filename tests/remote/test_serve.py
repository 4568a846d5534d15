"""Our own server with an LLM behind another one: it answers, and says when the LLM was gone."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from r2r_glimp.models import ModelPair
from r2r_glimp.remote import client
from tests.remote.fake import FakeServer
from tests.serve.conftest import start

CHAT = {
    "messages": [{"role": "user", "content": "Say hats 4.\nSum cups: hats and 3.\nHow many cups?"}],
    "max_tokens": 30,
    "router": "random",
    "threshold": 0.5,
    "granularity": "token",
    "seed": 1,
}


def test_the_llm_goes_away(
    connect: Callable[..., ModelPair], fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    pair = connect({"url": fake.url, "on_failure": "slm", "retries": 1, "timeout_s": 5.0})
    live = start(pair, kv_memory="16MiB")
    try:
        before: dict[str, Any] = live.chat(**CHAT).json()
        assert before["usage"]["llm_tokens"] > 0 and "llm_unavailable" not in before["usage"]
        fake.stop()
        after: dict[str, Any] = live.chat(**CHAT).json()
        assert after["choices"][0]["stop_reason"] == "llm_unavailable"
        assert after["choices"][0]["finish_reason"] == "stop"
        assert after["usage"]["llm_unavailable"] > 0 and after["usage"]["llm_tokens"] == 0
        assert live.http.get("/health").status_code == 200
        live.wait_idle()
    finally:
        live.stop()


def test_a_slow_llm_holds_up_nobody(connect: Callable[..., ModelPair], fake: FakeServer) -> None:
    live = start(connect({"url": fake.url, "timeout_s": 30.0}), kv_memory="16MiB", stall_s=0.5)
    try:
        fake.latency_s = 2.0
        stream = live.http.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "model": "pair:llm", "stream": True}
            | {"router": None, "threshold": None}
        )  # fmt: skip
        with stream as response:
            assert response.status_code == 200
            started = time.monotonic()
            quick = live.chat(model="pair:slm", max_tokens=8).json()
            assert quick["usage"]["slm_tokens"] > 0
            time.sleep(0.7)  # longer than a stall
            assert live.http.get("/health").status_code == 200
            assert time.monotonic() - started < 2.0
        live.wait_idle()  # closing the stream has ended it
    finally:
        live.stop()
