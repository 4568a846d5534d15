"""Requests unlike those of calibration: the log, /metrics and `usage` say so."""

import dataclasses
import logging

from r2r_glimp.routing.drift import DriftMonitor, Traffic
from tests.serve.conftest import make_router
from tests.serve.drift import like_calibration, make_engine, prose, watch

# A calibration with which the babbling pair's requests never agree.
ELSEWHERE = Traffic(
    measured_on="1000 other questions", threshold=0.25, answer_by="router", num_requests=1000,
    cuts=(0.999,), low=(0.0, 0.9), high=(1.0, 0.95),
)  # fmt: skip
WHAT = "scores_above_0.999"


def test_drift_is_told_in_the_log_the_metrics_and_the_usage(serve, caplog) -> None:
    live = serve(router=make_router(traffic=ELSEWHERE))
    with caplog.at_level(logging.WARNING, "r2r_glimp.serve"):
        assert "drift" not in live.chat().json()["usage"]
        for i in range(10):
            live.chat(seed=i, temperature=1.0)
        live.wait_idle()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told[0].startswith("drift: ")
    assert WHAT in told[0] and "1000 other questions" in told[0] and "\n" not in told[0]
    assert live.chat().json()["usage"]["drift"] == [WHAT]
    options = {"stream_options": {"include_usage": True}}
    assert live.events(**options)[-2]["usage"]["drift"] == [WHAT]
    live.wait_idle()
    assert live.metric(f'drift{{router="mlp-token",what="{WHAT}"}}') == 1
    assert live.metric('drift{router="mlp-token",what="llm_share"}') == 0
    assert live.metric(f'drift_recent{{router="mlp-token",what="{WHAT}"}}') < 0.9
    assert live.metric('drift_requests{router="mlp-token"}') == 13


def test_the_bundled_router_knows_its_requests() -> None:
    engine = make_engine()
    traffic = engine.router.traffic
    assert traffic is not None and traffic.threshold == engine.router.threshold("token")
    monitor = DriftMonitor(traffic)
    assert watch(engine, monitor, like_calibration(0), 120) is None
    assert monitor.num_requests == 120
    assert watch(engine, monitor, prose(), 300) is not None


def test_only_what_was_routed_as_in_calibration_is_compared(serve) -> None:
    live = serve(router=make_router(traffic=ELSEWHERE))
    assert live.service.catalog.is_watched
    (monitor,) = live.service.catalog.monitors.values()
    for body in (
        {"threshold": 0.9}, {"router": "entropy"}, {"model": "pair:llm"}, {"answer_by": "llm"},
        {"max_llm_share": 0.5}, {"max_step_tokens": 3}, {"target_llm_share": 0.3},
    ):  # fmt: skip
        assert live.chat(**body).is_success
    live.wait_idle()
    assert monitor.num_requests == 0 and not monitor._open
    for body in (
        {}, {"threshold": 0.25}, {"router": "mlp"}, {"n": 3, "temperature": 1.0, "stream": True},
    ):  # fmt: skip
        assert live.chat(**body).is_success
    live.wait_idle()
    assert monitor.num_requests == 4 and not monitor._open


def test_what_is_aborted_is_forgotten(serve) -> None:
    live = serve(router=make_router(traffic=ELSEWHERE), deadline_s=0.05)
    assert live.chat(max_tokens=450, ignore_eos=True).status_code == 504
    live.wait_idle()
    (monitor,) = live.service.catalog.monitors.values()
    assert monitor.num_requests == 0 and not monitor._open


def test_a_router_without_its_calibrations_traffic_is_not_watched(serve) -> None:
    assert not serve(router=make_router()).service.catalog.is_watched
    other = dataclasses.replace(ELSEWHERE, threshold=0.5)  # calibrated for another threshold
    assert not serve(router=make_router(traffic=other)).service.catalog.is_watched
