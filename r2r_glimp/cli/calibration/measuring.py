"""LLM shares on routed text: many prompts under several thresholds, in one batch of one engine."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from r2r_glimp.cli.requests import Request
from r2r_glimp.core import EngineError, Event, Granularity, RequestOutput, TokenEvent
from r2r_glimp.routing.calibration import Measurement, pilot_of
from r2r_glimp.routing.routers import Router

if TYPE_CHECKING:
    from r2r_glimp.engine.engine import Engine

Report = Callable[[Measurement, float], None]  # a point, and the seconds of its batch
Completion = tuple[int, RequestOutput, list[float]]  # its prompt's place, and its decisions' scores


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
        ids: dict[str, tuple[float, int]] = {}
        try:
            for threshold in thresholds:
                for place, request in enumerate(requests):
                    routing = dataclasses.replace(
                        request.routing,
                        router=self.router,
                        threshold=threshold,
                        granularity=self.granularity,
                    )
                    name = f"{request.name} at threshold {threshold!r}"
                    id = self.engine.add_request(request.prompt, request.sampling, routing, name)
                    ids[id] = (threshold, place)
            completions = self._run(ids)
        finally:
            for id in ids:  # interrupted: leave nothing behind
                self.engine.abort(id)
        points = [_point(t, completions[t], len(requests)) for t in dict.fromkeys(thresholds)]
        for point in points:
            self.report(point, time.monotonic() - started)
        return points

    def _run(self, ids: dict[str, tuple[float, int]]) -> dict[float, list[Completion]]:
        completions: dict[float, list[Completion]] = defaultdict(list)
        scores: dict[tuple[str, int], list[float]] = defaultdict(list)
        while self.engine.has_work:
            for event in self.engine.step():
                self._take(event, ids, scores, completions)
        return completions

    def _take(
        self,
        event: Event,
        ids: dict[str, tuple[float, int]],
        scores: dict[tuple[str, int], list[float]],
        completions: dict[float, list[Completion]],
    ) -> None:
        key = (event.request_id, event.index)
        if isinstance(event, TokenEvent):
            if event.score is not None:
                scores[key].append(event.score)
            return
        if event.output.finish_reason == "error":
            raise EngineError(f"{event.request_id}: {event.output.error}")
        threshold, place = ids[event.request_id]
        completions[threshold].append((place, event.output, scores.pop(key, [])))


def _point(threshold: float, completions: list[Completion], num_requests: int) -> Measurement:
    """Completions of one prompt count together: they are not drawn apart."""
    llm_tokens, tokens = np.zeros(num_requests, np.int64), np.zeros(num_requests, np.int64)
    for place, output, _ in completions:
        llm_tokens[place] += output.stats.llm_tokens
        tokens[place] += len(output.token_ids)
    scores = np.sort(np.array([score for _, _, some in completions for score in some], float))
    firsts = [(o.stats.llm_share, some) for _, o, some in completions if o.index == 0]
    return Measurement(threshold, llm_tokens, tokens, scores, firsts)
