"""What `/metrics` tells, in Prometheus' text format, after vLLM's names.

`python -m r2r_glimp.serve.metrics` prints the table of docs/serving.md.
"""

from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from r2r_glimp.core import RequestOutput, TokenEvent
from r2r_glimp.engine.engine import Engine
from r2r_glimp.routing.drift import DriftMonitor

M = TypeVar("M", bound=MetricWrapperBase)

PREFIX = "r2r_glimp:"
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.all: list[MetricWrapperBase] = []
        self._running = self._gauge("num_requests_running", "completions that run")
        self._waiting = self._gauge("num_requests_waiting", "completions that wait for room")
        self._blocks = self._gauge(
            "kv_blocks", "KV blocks of both models by state: live, free (cached ones are free)",
            "state",
        )  # fmt: skip
        self._live_blocks, self._free_blocks = (
            self._blocks.labels(state) for state in ("live", "free")
        )
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens of finished requests")
        self._cached_tokens = self._counter(
            "prompt_tokens_cached", "of these, found in the prefix cache by the SLM"
        )
        self._generated = self._counter("generation_tokens", "tokens written, by writer", "model")
        self._decisions = self._counter(
            "router_decisions", "decisions taken, by who was chosen", "target"
        )
        # Counted by hand within a tick: a counter takes a lock at each call.
        self._pending = [
            counter.labels(model)
            for counter in (self._generated, self._decisions)
            for model in ("slm", "llm")
        ]
        self._counts = [0] * len(self._pending)
        self._success = self._counter(
            "request_success", "completions that ended, by reason", "finished_reason"
        )
        self._preempted = self._counter(
            "num_preemptions", "times a completion gave its blocks back and was computed again"
        )
        self._errors = self._counter("request_errors", "HTTP answers from 400 on", "status")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "from the request's submission to its first token", _SLOW
        )
        self._between_tokens = self._histogram(
            "inter_token_latency_seconds", "between two tokens of a completion", _FAST
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "from submission to the completion's end", _SLOW
        )
        self._share = self._histogram("llm_share", "LLM-written share of a completion", _SHARES)
        self._compared = self._gauge(
            "drift_requests", "requests that were held against the router's calibration", "router"
        )
        self._drift = self._gauge(
            "drift", "1 while a statistic of requests has left calibration's band", "router", "what"
        )
        self._recent = self._gauge(
            "drift_recent", "that statistic's mean over the last 100 requests or so", "router",
            "what",
        )  # fmt: skip

    def observe_engine(self, engine: Engine) -> None:
        """Take down what a tick wrote, and what runs, waits and is held."""
        for counter, count in zip(self._pending, self._counts, strict=True):
            counter.inc(count)
        self._counts = [0] * len(self._pending)
        self._running.set(len(engine.running))
        self._waiting.set(len(engine.scheduler.waiting))
        free = sum(pool.num_free for pool in engine.kv.pools)
        total = engine.kv.num_blocks * len(engine.kv.pools)
        self._live_blocks.set(total - free)
        self._free_blocks.set(free)

    def count_token(self, event: TokenEvent, since_start: float, between: float | None) -> None:
        """Count one token.

        Args:
            since_start: seconds since its request came.
            between: seconds since the completion's token before, None for its first.
        """
        is_llm = event.source == "llm"
        self._counts[is_llm] += 1
        if event.score is not None:
            self._counts[2 + is_llm] += 1
        if between is None:
            self._first_token.observe(since_start)
        else:
            self._between_tokens.observe(between)

    def count_finished(self, output: RequestOutput, elapsed_s: float) -> None:
        """Count a completion that came to its end."""
        self._success.labels(output.finish_reason).inc()
        if output.index == 0:
            self._prompt_tokens.inc(len(output.prompt_token_ids))
            self._cached_tokens.inc(min(output.stats.prefix_hits, len(output.prompt_token_ids)))
        self._preempted.inc(output.stats.preemptions)
        self._whole.observe(elapsed_s)
        self._share.observe(output.stats.llm_share)

    def observe_drift(self, monitor: DriftMonitor) -> None:
        """Take down how a router's requests compare with those of its calibration."""
        self._compared.labels(monitor.name).set(monitor.num_requests)
        for name, mean in zip(monitor.traffic.names, monitor.recent, strict=True):
            self._drift.labels(monitor.name, name).set(name in monitor.drifting)
            self._recent.labels(monitor.name, name).set(mean)

    def count_aborted(self, count: int) -> None:
        """Count completions whose client left, or whose time was up."""
        self._success.labels("abort").inc(count)

    def count_error(self, status: int) -> None:
        """Count an answer with a status from 400 on."""
        self._errors.labels(str(status)).inc()

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return self._keep(Gauge(PREFIX + name, text, labels, registry=self.registry))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._keep(Counter(PREFIX + name, text, labels, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._keep(Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets))

    def _keep(self, metric: M) -> M:
        self.all.append(metric)
        return metric


def reference() -> str:
    """The metrics as a Markdown table."""
    rows = ["| metric | kind | labels | what |", "|---|---|---|---|"]
    for metric in Metrics().all:
        (described,) = metric.describe()
        name = described.name + ("_total" if described.type == "counter" else "")
        labels = ", ".join(metric._labelnames)
        rows.append(f"| `{name}` | {described.type} | {labels} | {described.documentation} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(reference())
