"""Routing per request: what a client may choose, and what it is told."""

import pytest

from tests.serve.conftest import Live, make_router
from tests.serve.test_bad_input import check

SEEDED = {"max_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True}


def routing_of(live: Live, **body):
    reply = live.chat(**SEEDED | body, return_routing=True)
    assert reply.is_success, reply.text
    return reply.json()["choices"][0]["routing"]


def test_the_threshold_decides(live: Live) -> None:
    shares = [
        routing_of(live, router="random", threshold=t)["llm_share"] for t in (0.0, 0.3, 0.7, 1.0)
    ]
    assert shares == sorted(shares) and shares[-1] > 0.9  # the guard may close the thinking
    assert shares[0] < 0.1  # a step, where the guard against loops calls the LLM
    assert routing_of(live, router="random", target_llm_share=0.3)["threshold"] == 0.3
    assert routing_of(live, router="random", threshold=1.0, max_llm_share=0.25)["llm_share"] <= 0.25


def test_what_is_told_adds_up(live: Live) -> None:
    told = routing_of(live, router="random", threshold=0.4)
    sources = [token["source"] for token in told["tokens"]]
    assert told["llm_tokens"] == sources.count("llm") and told["slm_tokens"] == sources.count("slm")
    assert told["switches"] == sum(a != b for a, b in zip(sources, sources[1:], strict=False))
    scores = [token["score"] for token in told["tokens"] if token["score"] is not None]
    assert len(scores) == told["decisions"]
    assert told["deferrals"] == sum(score < 0.4 for score in scores)


def test_granularity_and_answer(live: Live) -> None:
    step = routing_of(live, granularity="step", router="random", threshold=0.5, answer_by="slm")
    assert step["granularity"] == "step" and step["decisions"] < 40
    assert routing_of(live, granularity="token")["decisions"] == 40


def test_drafts_change_no_text(live: Live) -> None:
    for body in (
        {"model": "pair:llm"},
        {"granularity": "step", "router": "random", "threshold": 0.8, "max_step_tokens": 8},
    ):
        alone, drafted = routing_of(live, **body), routing_of(live, **body, speculate=4)
        assert drafted["tokens"] == alone["tokens"]
        assert drafted["draft_tokens"] > 0 == alone["draft_tokens"]


def test_a_trained_router_by_its_name(live: Live) -> None:
    """The names that a client may give lead to routers that are loaded; its curve gives a share."""
    pair, slm, _ = live.http.get("/v1/models").json()["data"]
    assert pair["routers"][-1] == "mlp" and "routers" not in slm
    # One that is trained for a granularity is not the default if the server was started otherwise.
    default = {"router": "random", "granularity": "token", "threshold": 0.1}
    assert pair["default_routing"] == default
    told = routing_of(live, router="mlp", target_llm_share=0.3)
    assert told["router"] == "mlp" and told["threshold"] == pytest.approx(0.4)
    assert routing_of(live, router="mlp")["threshold"] == 0.25
    assert live.chat(granularity="token").is_success
    check(live.chat(router="mlp", granularity="step"), 400)


def test_a_default_router_that_is_trained(serve) -> None:
    live = serve(router=make_router("step"))
    assert routing_of(live)["granularity"] == "step"
    assert "step" in check(live.chat(granularity="token"), 400)["message"]
    assert routing_of(live, router="entropy", granularity="token")["threshold"] == 0.45
    assert routing_of(live, model="pair:llm")["llm_share"] == 1
    assert routing_of(live, model="pair:slm", granularity="token")["llm_share"] == 0


def test_the_playground_is_a_page_of_its_own(live: Live, tmp_path, monkeypatch) -> None:
    from r2r_glimp.serve import app

    monkeypatch.setattr(app, "PLAYGROUND", tmp_path / "page.html")
    assert "/v1" in live.http.get("/").text
    (tmp_path / "page.html").write_text("<h1>Hi</h1>")
    page = live.http.get("/")
    assert page.text == "<h1>Hi</h1>" and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
