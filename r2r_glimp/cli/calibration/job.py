"""One calibration: which thresholds to measure, and what came of it."""

import dataclasses
import sys
from dataclasses import astuple
from typing import Any

from r2r_glimp.cli.calibration.labels import Labels, load_labels
from r2r_glimp.cli.calibration.measuring import Meter
from r2r_glimp.cli.calibration.prompts import Prompts, in_template
from r2r_glimp.cli.calibration.results import Found, Outcome
from r2r_glimp.cli.calibration.target import TargetOptions
from r2r_glimp.cli.errors import say
from r2r_glimp.cli.generate import has_chat_template
from r2r_glimp.cli.requests import Request
from r2r_glimp.core import RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.evaluation.cost import count_parameters
from r2r_glimp.hub.checkpoint import RouterCheckpoint
from r2r_glimp.routing.calibration import (
    Measurement,
    ShareCurve,
    parse_count,
    search_shares,
    share_for_parameters,
    threshold_range,
)
from r2r_glimp.routing.mixture import Mixture, Scale, mixture_threshold
from r2r_glimp.routing.policy import Route

_MIXTURE_ROUNDS = 4
Named = list[tuple[str, float | None, Measurement]]  # a threshold's name, its target, its point


class Job:
    """One calibration with one engine."""

    def __init__(
        self,
        engine: Engine,
        target: TargetOptions,
        routing: RoutingParams,
        prompts: Prompts,
        checkpoint: RouterCheckpoint | None,
        *,
        raw: bool,
        quiet: bool,
    ) -> None:
        self.engine, self.target, self.prompts = engine, target, prompts
        self.router, self.quiet = engine.router, quiet
        self.route = Route.resolve(routing, self.router, shared=engine.pair.same_vocabulary)
        templated = has_chat_template(engine.pair) and not raw
        self.meter = self._meter(prompts.requests, templated)
        self.fresh = self._meter(prompts.fresh, templated)
        self.labels = self._load_labels(checkpoint)
        self.parameters = count_parameters(engine.pair, self.router)

    def run(self) -> Outcome:
        """Search, then look at the fresh prompts.

        Raises:
            UsageError, DataError, EngineError: the target cannot be met, a prompt does not fit, or
                a request failed.
        """
        target, curve = self.target, ShareCurve()
        mixture: tuple[Mixture, Scale] | None = None
        named: Named
        if target.mixture:
            mixture, point = self._by_mixture(curve)
            named = [("mixture", None, point)]
        elif target.target_recall is not None:
            assert self.labels is not None
            threshold = self.labels.threshold_at(target.target_recall)
            (point,) = self.meter.measure([threshold])
            curve.add([point])
            named = [(f"recall-{target.target_recall:.2f}", None, point)]
        else:
            named = self._by_share(curve)
        fresh = self.fresh.measure([p.threshold for _, _, p in named]) if self.prompts.fresh else []
        found = []
        for i, (name, share, point) in enumerate(named):
            recall = precision = None
            if self.labels is not None:
                recall, precision = self.labels.quality_at(point.threshold)
            further = fresh[i] if fresh else None
            found.append(Found(name, share, point, recall, precision, further))
        sampling = self.prompts.requests[0].sampling
        return Outcome(
            route=self.route,
            prompts=self.prompts.name,
            sampling=_describe(sampling),
            parameters=self.parameters,
            found=found,
            curve=curve,
            labels=self.labels,
            mixture=mixture,
        )

    def _by_share(self, curve: ShareCurve) -> Named:
        target = self.target
        names = {share: f"share-{share:.4g}" for share in target.target_llm_share}
        if target.target_avg_params is not None:
            slm, router, llm = astuple(self.parameters)
            count = parse_count(target.target_avg_params)
            share = share_for_parameters(count, slm, llm, router)
            names = {share: f"params-{str(target.target_avg_params).strip()}"}
        low, high = threshold_range(self.router, self.engine.pair.slm.fingerprint.vocab_size)
        calibration = search_shares(
            self.meter.measure,
            list(names),
            low=low,
            high=high,
            tolerance=target.tolerance,
            max_steps=target.max_steps,
            pilot=self.meter.has_pilot,
            why_not=self._why_not,
        )
        curve.add(calibration.curve.points)
        for share, point in calibration.found.items():
            if abs(point.share - share) > target.tolerance * share:
                say("warning", f"no threshold gives {share:.4g}: the nearest is {point.share:.4g}")
        return [(name, share, calibration.found[share]) for share, name in names.items()]

    def _by_mixture(self, curve: ShareCurve) -> tuple[tuple[Mixture, Scale], Measurement]:
        """Fit, route under the border, and fit again to the routed text's scores, until the
        border stays where it is."""
        scale: Any = self.target.mixture_scale
        if scale == "auto":
            scale = "logit" if self.router.name == "mlp" else "log"
        _, high = threshold_range(self.router, self.engine.pair.slm.fingerprint.vocab_size)
        (point,) = self.meter.measure([high])
        for _ in range(_MIXTURE_ROUNDS):
            curve.add([point])
            threshold, mixture = mixture_threshold(point.scores, scale)
            before = point
            (point,) = self.meter.measure([threshold])
            if abs(point.share - before.share) <= self.target.tolerance * before.share:
                break
        curve.add([point])
        return (mixture, scale), point

    def _why_not(self, target: float, nearest: Measurement) -> str:
        route = self.route
        if nearest.share > target:
            hint = "--answer_by router routes the answer too" if route.answer_by == "llm" else ""
            bound = "never below"
        else:
            hint = "--answer_by router or llm lets it have the answer" * (route.answer_by == "slm")
            bound = "never above"
        what = f"the LLM share is {bound} {nearest.share:.1%} here, {target:.4g} was asked for"
        return f"{what}: {hint}" if hint else f"{what}: its limits, or the prompts, are in the way"

    def _meter(self, requests: list[Request], templated: bool) -> Meter:
        if templated:
            requests = [dataclasses.replace(r, prompt=in_template(r)) for r in requests]
        report = _silent if self.quiet else _report
        return Meter(self.engine, self.router, self.route.granularity, requests, report)

    def _load_labels(self, checkpoint: RouterCheckpoint | None) -> Labels | None:
        if self.target.labels is None:
            return None
        pair = self.engine.pair
        return load_labels(
            self.target.labels, self.router, self.route.granularity, pair.slm, checkpoint
        )


def _describe(sampling: SamplingParams) -> str:
    if sampling.temperature == 0:
        return "greedy"
    return f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}"


def _report(point: Measurement, seconds: float) -> None:
    print(
        f"  threshold {point.threshold:<10.5g} LLM share {point.share:7.2%}  "
        f"({point.num_requests:,} prompts, {seconds:.1f} s)",
        file=sys.stderr,
        flush=True,
    )


def _silent(point: Measurement, seconds: float) -> None: ...
