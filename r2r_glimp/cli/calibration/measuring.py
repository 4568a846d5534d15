"""LLM shares on routed text: many prompts under several thresholds, in one batch of one engine."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from r2r_glimp.cli.requests import Request
from r2r_glimp.core import EngineError, FinishEvent, Granularity, RequestOutput
from r2r_glimp.routing.calibration import Measurement, pilot_of
from r2r_glimp.routing.routers import Router
from r2r_glimp.routing.signals import Signals

if TYPE_CHECKING:
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.models.pair import LoadedModel

Report = Callable[[Measurement, float], None]  # a point, and the seconds of its batch


class RecordingRouter(Router):
    """Another router, whose scores are kept."""

    def __init__(self, router: Router) -> None:
        self.router, self.name = router, router.name
        self.granularity, self.constant = router.granularity, router.constant
        self.hidden_layer = router.hidden_layer
        self.scores: list[Tensor] = []

    def threshold(self, granularity: Granularity) -> float:
        return self.router.threshold(granularity)

    def defers(self, score: float, threshold: float) -> bool:
        return self.router.defers(score, threshold)

    def bind(self, slm: "LoadedModel") -> None:
        """Pass the SLM on to a trained router."""
        bind = getattr(self.router, "bind", None)
        if bind is not None:
            bind(slm)

    def score(self, signals: Signals) -> Tensor:
        scores = self.router.score(signals)
        self.scores.append(scores.detach().cpu().double())
        return scores


class Meter:
    """Measures thresholds with one engine.

    Args:
        engine: what routes.
        router: whose threshold it is.
        granularity: of the decisions.
        requests: the prompts, each with its own sampling and routing.
        report: called with each point.
    """

    def __init__(
        self,
        engine: "Engine",
        router: Router,
        granularity: Granularity,
        requests: Sequence[Request],
        report: Report,
    ) -> None:
        self.engine, self.router, self.granularity = engine, router, granularity
        self.requests, self.report = list(requests), report
        self.pilot = pilot_of(self.requests)

    @property
    def has_pilot(self) -> bool:
        """Whether the pilot is less than all."""
        return len(self.pilot) < len(self.requests)

    def measure(self, thresholds: Sequence[float], pilot: bool = False) -> list[Measurement]:
        """Route every prompt, or the pilot's, under each of the thresholds.

        Raises:
            UsageError, DataError: a prompt does not fit.
            EngineError: a request failed.
        """
        started = time.monotonic()
        requests = self.pilot if pilot else self.requests
        recorders = {t: RecordingRouter(self.router) for t in thresholds}
        ids: dict[str, tuple[float, int]] = {}
        try:
            for threshold, recorder in recorders.items():
                for place, request in enumerate(requests):
                    routing = dataclasses.replace(
                        request.routing,
                        router=recorder,
                        threshold=threshold,
                        granularity=self.granularity,
                    )
                    name = f"{request.name} at threshold {threshold!r}"
                    id = self.engine.add_request(request.prompt, request.sampling, routing, name)
                    ids[id] = (threshold, place)
            outputs = self._run(ids)
        finally:
            for id in ids:  # interrupted: leave nothing behind
                self.engine.abort(id)
        points = [
            _point(threshold, outputs[threshold], len(requests), recorder)
            for threshold, recorder in recorders.items()
        ]
        for point in points:
            self.report(point, time.monotonic() - started)
        return points

    def _run(self, ids: dict[str, tuple[float, int]]) -> "Outputs":
        outputs: Outputs = defaultdict(list)
        while self.engine.has_work:
            for event in self.engine.step():
                if isinstance(event, FinishEvent):
                    output, (threshold, place) = event.output, ids[event.request_id]
                    if output.finish_reason == "error":
                        raise EngineError(f"{event.request_id}: {output.error}")
                    outputs[threshold].append((place, output))
        return outputs


Outputs = dict[float, list[tuple[int, RequestOutput]]]  # by threshold, with the prompts' places


def _point(
    threshold: float,
    outputs: list[tuple[int, RequestOutput]],
    num_requests: int,
    recorder: RecordingRouter,
) -> Measurement:
    """Completions of one prompt count together: they are not drawn apart."""
    llm_tokens, tokens = np.zeros(num_requests, np.int64), np.zeros(num_requests, np.int64)
    for place, output in outputs:
        llm_tokens[place] += output.stats.llm_tokens
        tokens[place] += len(output.token_ids)
    parts = [scores.numpy() for scores in recorder.scores]
    scores = np.sort(np.concatenate(parts)) if parts else np.empty(0)
    return Measurement(threshold, llm_tokens, tokens, scores)
