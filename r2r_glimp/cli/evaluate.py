"""`r2r-glimp evaluate`: how right, and how cheap, the pair is under several routers.

Both models alone, routers at wanted LLM shares, and an oracle, all on the same questions; a table
with intervals, paired tests and plots. A run that was stopped goes on where it was.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from labeling.sections import SourceConfig
from r2r_glimp.cli.options import (
    EngineOptions,
    PairOptions,
    check_routing,
    default_router,
    load_pair,
    make_router,
)
from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import Granularity, RoutingParams, SamplingParams, UsageError
from r2r_glimp.evaluation.system import BASELINES, ORACLE, System

if TYPE_CHECKING:
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.evaluation.run import Setting
    from r2r_glimp.evaluation.store import Store
    from r2r_glimp.evaluation.task import Task
    from r2r_glimp.routing.routers import Router

EXAMPLES = (
    "--config configs/evaluation/abacus.yaml",
    "--limit 100 --routers slm --routers llm --routers entropy --shares 0.2",
    "--pair qwen3-0.6b-8b --config configs/evaluation/aime24.yaml --routers mine --repeats 4",
    "--pair mine.yaml --task.kind file --task.path questions.jsonl --task.answer_key answer "
    "--task.answer boxed --routers entropy --thresholds 0.5 --thresholds 1.0",
)
GRANULARITIES: tuple[Granularity, ...] = ("token", "step")
_FREE = ("random", "entropy", "margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemOptions:
    """What is compared.

    Args:
        routers: slm, llm, random, entropy, margin, oracle, or the folder or Hub id of a trained
            router. By default slm, llm, random, entropy, and the bundled pair's trained ones.
        granularities: token and step; by default both. A trained router has its own.
        shares: LLM shares that a threshold is found for, on prompts that are not evaluated.
        thresholds: thresholds as they are, in place of shares.
        calibration_prompts: questions that thresholds are found on.
    """

    routers: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    calibration_prompts: int = 500

    def __post_init__(self) -> None:
        for name in self.granularities:
            if name not in GRANULARITIES:
                raise UsageError(f"--granularities {name}: choose token or step")
        for share in self.shares:
            if not 0 < float(share) < 1:
                raise UsageError(f"--shares {share} is out of range: above 0, below 1")
        if self.calibration_prompts < 1:
            raise UsageError("--calibration_prompts must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The run.

    Args:
        out: folder of samples, tables and plots (by default runs/evaluate/TASK).
        limit: only the first so many questions.
        repeats: answers per question; more than one needs a temperature.
        raw: send questions as they are, without the chat template.
        overwrite: start again instead of going on.
        json: the summary as one JSON object on stdout, in place of the table.
        quiet: no progress.
    """

    out: str | None = None
    limit: int | None = None
    repeats: int = 1
    raw: bool = False
    overwrite: bool = False
    json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} is out of range: 1 or more")


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("evaluate", "[options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    parser.add_fields(parser.add_argument_group("systems"), SystemOptions)
    parser.add_fields(parser.add_argument_group("run"), RunOptions)
    parser.add_class_arguments(SourceConfig, "task")
    parser.add_class_arguments(SourceConfig, "calibration")
    parser.add_fields(parser.add_argument_group("models"), PairOptions)
    limits = parser.add_argument_group("routing: limits of all systems")
    parser.add_fields(limits, RoutingParams, ("router", "granularity", "threshold", "trace"))
    parser.add_fields(parser.add_argument_group("sampling"), SamplingParams, ("n", "logprobs"))
    parser.add_fields(parser.add_argument_group("engine"), EngineOptions)
    parser.set_defaults(
        {
            "max_batch": 64,
            "task.split": "test",
            "calibration.split": "validation",
        }
    )
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    options = build_parser().parse(argv)
    chosen, where = pick(SystemOptions, options), pick(RunOptions, options)
    sampling, routing = pick(SamplingParams, options), pick(RoutingParams, options)
    check_routing(routing)
    if where.repeats > 1 and not sampling.temperature:
        raise UsageError("--repeats needs --temperature: greedy answers are all the same")
    source = SourceConfig(**options.task.as_dict())
    routers = _routers(chosen, options)
    _check_shares(chosen, options, source)

    from r2r_glimp.cli.generate import has_chat_template
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.evaluation.run import Setting
    from r2r_glimp.evaluation.store import Store
    from r2r_glimp.evaluation.task import load_task

    task = load_task(source, where.limit)
    loaded = {name: make_router(name) for name in routers if name not in (*BASELINES, ORACLE)}
    store = Store(Path(where.out or f"runs/evaluate/{task.name}"))
    with store.lock():
        pair = load_pair(pick(PairOptions, options))
        templated = has_chat_template(pair) and not where.raw
        setting = Setting(sampling, routing, where.repeats, templated)
        run_key = {
            "pair": [dataclasses.asdict(model.fingerprint) for model in (pair.slm, pair.llm)],
            "task": dataclasses.asdict(source) | {"limit": where.limit},
            "sampling": dataclasses.asdict(sampling),
            "routing": dataclasses.asdict(routing),
            "repeats": where.repeats,
            "templated": templated,
        }
        store.start(json.loads(json.dumps(run_key, default=str)), overwrite=where.overwrite)
        engine = Engine(pair, router="entropy", **dataclasses.asdict(pick(EngineOptions, options)))
        job = Job(engine, task, setting, store, loaded, quiet=where.quiet)
        systems = job.systems(routers, chosen, options)
        return _report(job, systems, as_json=where.json)


class Job:
    """One evaluation with one engine."""

    def __init__(
        self,
        engine: "Engine",
        task: "Task",
        setting: "Setting",
        store: "Store",
        routers: "dict[str, Router]",
        *,
        quiet: bool,
    ) -> None:
        self.engine, self.task, self.setting, self.store = engine, task, setting, store
        self.routers, self.quiet = routers, quiet

    def systems(
        self, routers: Sequence[str], chosen: SystemOptions, options: Namespace
    ) -> list[System]:
        """The cross product, thresholds found where shares are wanted."""
        found: list[System] = []
        wanted = [g for g in GRANULARITIES if g in (chosen.granularities or GRANULARITIES)]
        for name in routers:
            if name in BASELINES:
                found.append(System(router=name))
                continue
            own = None if name == ORACLE else self.routers[name].granularity
            for granularity in wanted:
                if own in (None, granularity):
                    found += self._points(name, granularity, chosen, options)
        return found

    def _points(
        self, name: str, granularity: Granularity, chosen: SystemOptions, options: Namespace
    ) -> list[System]:
        if name == ORACLE:
            return [System(router=name, granularity=granularity)]
        shares = tuple(map(float, chosen.shares))
        points = [
            System(router=name, granularity=granularity, threshold=t, target_share=share)
            for share, t in self._thresholds(name, granularity, shares, chosen, options).items()
        ]
        points += [
            System(router=name, granularity=granularity, threshold=float(t))
            for t in chosen.thresholds
        ]
        if not points or name not in _FREE:
            own = self.routers[name].threshold(granularity)
            points.append(System(router=name, granularity=granularity, threshold=own))
        return points

    def _thresholds(
        self,
        name: str,
        granularity: Granularity,
        shares: tuple[float, ...],
        chosen: SystemOptions,
        options: Namespace,
    ) -> dict[float, float]:
        """Thresholds for LLM shares, found on the calibration's questions and kept."""
        if name == "random":
            return {share: share for share in shares}  # its threshold is a share
        keys = {share: f"{name}/{granularity}@{share:g}" for share in shares}
        kept = self.store.thresholds()
        missing = [share for share in shares if keys[share] not in kept]
        if missing:
            kept |= {
                keys[share]: threshold
                for share, threshold in self._search(
                    name, granularity, missing, chosen, options
                ).items()
            }
            self.store.write("thresholds.json", json.dumps(kept, indent=2) + "\n")
        return {share: kept[keys[share]] for share in shares}

    def _search(
        self,
        name: str,
        granularity: Granularity,
        shares: list[float],
        chosen: SystemOptions,
        options: Namespace,
    ) -> dict[float, float]:
        from labeling.sources import load_questions
        from r2r_glimp.cli.calibration.measuring import Meter
        from r2r_glimp.cli.requests import Request
        from r2r_glimp.routing.calibration import search_shares, threshold_range

        source = SourceConfig(**options.calibration.as_dict())
        questions = load_questions(source, limit=chosen.calibration_prompts)
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

    def answer(self, system: System) -> Any:
        """A system's result; what it answered before is kept."""
        from r2r_glimp.evaluation.cost import count_parameters
        from r2r_glimp.evaluation.run import answer_all
        from r2r_glimp.evaluation.summary import Result

        router = self.routers.get(system.router)
        if system.router in BASELINES:
            router = make_router(system.router)
        total = len(self.task.questions) * self.setting.repeats
        done = len(self.store.samples(system.slug))
        started = time.monotonic()
        with self._progress(system, total, done) as advance:
            samples = answer_all(
                self.engine, self.task, system, router, self.setting, self.store, advance
            )
        seconds = time.monotonic() - started
        parameters = count_parameters(self.engine.pair, router)
        return Result(system, samples, parameters, seconds if done == 0 else 0.0)

    def _progress(self, system: System, total: int, done: int) -> Any:
        from r2r_glimp.cli.progress import progress

        label = f"{system.name} {system.granularity or ''}"
        if system.target_share is not None:
            label += f" at {system.target_share:.0%}"
        return progress(label.strip(), total, done, quiet=self.quiet)

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _report(job: Job, systems: Sequence[System], *, as_json: bool) -> int:
    from importlib.util import find_spec

    from r2r_glimp.evaluation.summary import summarise, to_markdown

    results = [job.answer(system) for system in systems]
    summary = summarise(job.task.name, job.setting.repeats, results)
    text = json.dumps(summary.to_dict(), allow_nan=False)
    job.store.write("summary.json", text + "\n")
    job.store.write("summary.md", to_markdown(summary))
    if find_spec("matplotlib") is not None:
        from r2r_glimp.evaluation.plots import draw

        draw(summary, job.store.out)
    else:
        print("no plots: matplotlib is not installed (r2r_glimp[eval])", file=sys.stderr)
    print(text if as_json else to_markdown(summary), end="\n" if as_json else "")
    print(f"samples, tables and plots: {job.store.out}", file=sys.stderr)
    return 0


def _routers(chosen: SystemOptions, options: Namespace) -> list[str]:
    """The routers by name; by default those that need nothing, and the bundled trained ones."""
    if chosen.routers:
        return list(dict.fromkeys(chosen.routers))
    trained = [default_router(options, granularity) for granularity in GRANULARITIES]
    return [*dict.fromkeys(("slm", "llm", "random", "entropy", *trained))]


def _check_shares(chosen: SystemOptions, options: Namespace, source: SourceConfig) -> None:
    if not chosen.shares:
        return
    calibration = SourceConfig(**options.calibration.as_dict())
    if source.kind != "abacus" and calibration.kind == "abacus":
        raise UsageError(
            "--shares needs questions that are not evaluated: give --calibration.kind and "
            "--calibration.path, or --thresholds"
        )
    if (calibration.kind, calibration.path, calibration.split, calibration.seed) == (
        source.kind,
        source.path,
        source.split,
        source.seed,
    ) and calibration.where == source.where:
        raise UsageError(
            "--calibration names the questions that are evaluated: a threshold chosen on them "
            "proves nothing"
        )
