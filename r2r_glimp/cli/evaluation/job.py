"""One evaluation: which systems there are, and their answers."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from labeling.sections import SourceConfig
from labeling.sources import load_questions
from r2r_glimp.cli.calibration.measuring import Meter
from r2r_glimp.cli.evaluation.options import Comparison
from r2r_glimp.cli.options import make_router
from r2r_glimp.cli.progress import progress
from r2r_glimp.cli.requests import Request
from r2r_glimp.core import Granularity, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.evaluation.cost import count_parameters
from r2r_glimp.evaluation.run import Setting, answer_all
from r2r_glimp.evaluation.store import Store
from r2r_glimp.evaluation.summary import Result
from r2r_glimp.evaluation.system import BASELINES, FREE, ORACLE, System
from r2r_glimp.evaluation.task import Task
from r2r_glimp.routing.calibration import search_shares, threshold_range
from r2r_glimp.routing.policy import default_answer_by
from r2r_glimp.routing.routers import Router


class Job:
    """One evaluation with one engine.

    Args:
        engine: of the pair.
        task: what is asked.
        setting: what all systems share.
        store: where samples are kept.
        wanted: which systems.
        routers: loaded, by name; baselines and the oracle need none.
        calibration: questions on which thresholds for shares are found.
        quiet: no progress.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        setting: Setting,
        store: Store,
        wanted: Comparison,
        routers: dict[str, Router],
        calibration: SourceConfig,
        *,
        quiet: bool,
    ) -> None:
        self.engine, self.task, self.setting, self.store = engine, task, setting, store
        self.wanted, self.routers, self.calibration = wanted, routers, calibration
        self.quiet = quiet

    def run(self) -> list[Result]:
        """Every system's answers; where no shares are wanted, random at each one's share.

        Raises:
            UsageError: no router is made for the granularity that is wanted.
        """
        systems = self._systems()
        if not systems:
            raise UsageError(
                f"no system is left: none of {', '.join(self.wanted.routers)} decides per "
                f"{' or '.join(self._granularities())}"
            )
        results = [self._answer(system) for system in systems]
        if self._random_follows:
            for result in tuple(results):
                system = result.system
                if system.granularity is None or system.router == ORACLE:
                    continue
                answer_by = self.setting.routing.answer_by or default_answer_by(system.granularity)
                if rate := round(result.random_rate(answer_by), 4):
                    results.append(self._answer(system.matched_by_random(rate)))
        return results

    @property
    def _random_follows(self) -> bool:
        """Whether random decisions are made at the shares of other systems."""
        names = self.wanted.routers
        others = [name for name in names if name not in (*BASELINES, ORACLE, "random")]
        return "random" in names and bool(others) and not self.wanted.chosen.shares

    def _systems(self) -> list[System]:
        """The cross product, thresholds found where shares are wanted."""
        found: list[System] = []
        for name in self.wanted.routers:
            if name in BASELINES:
                found.append(System(router=name))
                continue
            own = None if name == ORACLE else self.routers[name].granularity
            for granularity in self._granularities():
                if own in (None, granularity):
                    found += self._points(name, granularity)
        return found

    def _granularities(self) -> Sequence[Granularity]:
        """A pair with two vocabularies has but one granularity, unless another is asked for."""
        every = self.wanted.granularities
        return every if len(every) == 1 or self.engine.pair.same_vocabulary else ("step",)

    def _points(self, name: str, granularity: Granularity) -> list[System]:
        chosen, wanted = self.wanted.chosen, self.wanted
        if name == ORACLE:
            return [System(router=name, granularity=granularity)]
        shares = tuple(map(float, chosen.shares))
        points = [
            System(router=name, granularity=granularity, threshold=t, target_share=share)
            for share, t in self._thresholds(name, granularity, shares).items()
        ]
        if name == "random" and self._random_follows:
            return points
        own = self.routers[name].threshold(granularity)
        given = tuple(map(float, chosen.thresholds))
        if name == wanted.router.router and wanted.threshold is not None:
            given = (*given, wanted.threshold)
        elif name not in FREE or not (points or given):
            given = (*given, own)
        points += [System(router=name, granularity=granularity, threshold=t) for t in given]
        return points

    def _thresholds(
        self, name: str, granularity: Granularity, shares: tuple[float, ...]
    ) -> dict[float, float]:
        """Thresholds for LLM shares, found on the calibration's questions and kept."""
        if name == "random":
            return {share: share for share in shares}  # its threshold is a share
        keys = {share: f"{name}/{granularity}@{share:g}" for share in shares}
        kept = self.store.thresholds()
        missing = [share for share in shares if keys[share] not in kept]
        if missing:
            found = self._search(name, granularity, missing)
            kept |= {keys[share]: threshold for share, threshold in found.items()}
            self.store.write("thresholds.json", json.dumps(kept, indent=2) + "\n")
        return {share: kept[keys[share]] for share in shares}

    def _search(
        self, name: str, granularity: Granularity, shares: list[float]
    ) -> dict[float, float]:
        questions = load_questions(self.calibration, limit=self.wanted.chosen.calibration_prompts)
        self._say(f"{name} per {granularity}: thresholds on {len(questions)} other questions")
        base, routing = self.setting.sampling, self.setting.routing
        requests = [
            Request(
                self.setting.prompt(question),
                dataclasses.replace(base, seed=(base.seed or 0) + place),
                routing,
            )
            for place, question in enumerate(questions)
        ]
        router = self.routers[name]
        meter = Meter(self.engine, router, granularity, requests, lambda point, seconds: None)
        low, high = threshold_range(router, self.engine.pair.slm.fingerprint.vocab_size)
        found = search_shares(
            meter.measure,
            shares,
            low=low,
            high=high,
            pilot=meter.has_pilot,
            why_not=lambda share, nearest: (
                f"{name} per {granularity}: no threshold gives an LLM share of {share:g}, the "
                f"nearest is {nearest.share:.1%} (--answer_by router routes the answer too)"
            ),
        )
        return {share: point.threshold for share, point in found.found.items()}

    def _answer(self, system: System) -> Result:
        """A system's result; what it answered before is kept."""
        router = self.routers.get(system.router)
        if system.router in BASELINES:
            router = make_router(system.router)
        total = len(self.task.questions) * self.setting.repeats
        done = len(self.store.answered(system.slug))
        self.engine.kv.forget_all()  # no system pays less for coming later
        started = time.monotonic()
        try:
            with self._progress(system, total, done) as advance:
                samples = answer_all(
                    self.engine, self.task, system, router, self.setting, self.store, advance
                )
        finally:
            if done < total:
                self.store.add_seconds(system.slug, time.monotonic() - started)
        parameters = count_parameters(self.engine.pair, router)
        seconds = self.store.seconds().get(system.slug, 0.0)
        return Result(system, samples, parameters, seconds)

    def _progress(self, system: System, total: int, done: int) -> AbstractContextManager[Any]:
        label = f"{system.name} {system.granularity or ''}"
        if system.target_share is not None:
            label += f" at {system.target_share:.0%}"
        return progress(label.strip(), total, done, quiet=self.quiet)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
