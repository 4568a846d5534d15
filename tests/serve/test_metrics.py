"""Metrics: they count what happened, and the documentation lists them all."""

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from r2r_glimp import __version__
from r2r_glimp.serve.metrics import reference
from tests.serve.conftest import Live


def samples(live: Live) -> dict[str, float]:
    text = live.http.get("/metrics").text
    return {
        sample.name + "".join(f",{v}" for v in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_they_count(live: Live) -> None:
    live.wait_idle()
    before = samples(live)
    replies = [live.chat(max_tokens=20, ignore_eos=True, seed=i).json() for i in range(3)]
    live.chat(temperature=9)
    live.wait_idle()
    after = samples(live)

    def grown(name: str) -> float:
        return after.get(f"r2r_glimp:{name}", 0) - before.get(f"r2r_glimp:{name}", 0)

    for model in ("slm", "llm"):
        told = sum(reply["usage"][f"{model}_tokens"] for reply in replies)
        assert grown(f"generation_tokens_total,{model}") == told
    assert grown("prompt_tokens_total") == sum(r["usage"]["prompt_tokens"] for r in replies)
    assert grown("request_success_total,length") == 3
    assert grown("request_errors_total,400") == 1
    assert grown("time_to_first_token_seconds_count") == 3
    assert grown("inter_token_latency_seconds_count") == 57
    assert grown("e2e_request_latency_seconds_count") == grown("llm_share_count") == 3
    assert after["r2r_glimp:num_requests_running"] == 0 == after["r2r_glimp:kv_blocks,live"]


def test_the_documentation_lists_them_all() -> None:
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    assert reference() in page.read_text(encoding="utf-8")


def test_health_version_and_ids(live: Live) -> None:
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.http.get("/ready").json() == {"status": "ready"}
    assert live.http.get("/version").json() == {"version": __version__}
    assert live.http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == (
        "mine-1"
    )
    odd = live.http.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert odd != "a b" and odd.isalnum()
