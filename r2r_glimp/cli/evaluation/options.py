"""Options of an evaluation: what is compared, and how the run goes. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jsonargparse import Namespace

from labeling.sections import SourceConfig
from r2r_glimp.cli.options import RouterOptions, check_routing, default_router
from r2r_glimp.cli.parser import pick
from r2r_glimp.core import Granularity, RoutingParams, SamplingParams, UsageError
from r2r_glimp.evaluation.system import BASELINES

GRANULARITIES: tuple[Granularity, ...] = ("token", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemOptions:
    """What is compared.

    Args:
        routers: slm, llm, random, entropy, margin, oracle, or the folder or Hub id of a trained
            router. By default slm, llm and --router; without it slm, llm, random, entropy, and the
            bundled pair's trained ones. Without --shares, random gets the share of every other one.
        granularities: token and step; by default --granularity, else both. A trained router has
            its own.
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
        allow_errors: exit with 0 though answers failed.
        json: the summary as one JSON object on stdout, in place of the table.
        quiet: no progress.
    """

    out: str | None = None
    limit: int | None = None
    repeats: int = 1
    raw: bool = False
    overwrite: bool = False
    allow_errors: bool = False
    json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} is out of range: 1 or more")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared, defaults filled in.

    Attributes:
        routers: names, each once.
        granularities: in which routers that have none of their own are tried.
        threshold: of `router` alone, where one was given.
    """

    chosen: SystemOptions
    routers: Sequence[str]
    granularities: Sequence[Granularity]
    router: RouterOptions
    threshold: float | None


def read_comparison(options: Namespace, routing: RoutingParams) -> Comparison:
    """The systems that options ask for; a routing preset's is one of them.

    Raises:
        UsageError: options contradict each other.
    """
    chosen, router = pick(SystemOptions, options), pick(RouterOptions, options)
    check_routing(routing)
    names = list(chosen.routers)
    if not names and router.router is None:
        trained = [default_router(options, granularity) for granularity in GRANULARITIES]
        names = [*BASELINES, "random", "entropy", *trained]
    elif not names:
        names = [*BASELINES]
    if router.router is not None:
        names.append(router.router)
    elif routing.threshold is not None:
        raise UsageError("--threshold goes with --router; for --routers there is --thresholds")
    if router.entropy_top_k is not None and "entropy" not in names:
        raise UsageError("--entropy_top_k goes with router entropy only")
    wanted = chosen.granularities or (routing.granularity and (routing.granularity,)) or ()
    granularities = [g for g in GRANULARITIES if g in (wanted or GRANULARITIES)]
    return Comparison(chosen, list(dict.fromkeys(names)), granularities, router, routing.threshold)


def shared_routing(routing: RoutingParams) -> RoutingParams:
    """What all systems have in common: the limits."""
    return replace(routing, router=None, granularity=None, threshold=None)


def check_run(
    run: RunOptions,
    sampling: SamplingParams,
    chosen: SystemOptions,
    task: SourceConfig,
    calibration: SourceConfig,
) -> None:
    """What can be wrong before anything is read.

    Raises:
        UsageError: repeats of one and the same answer, or thresholds found on the questions asked.
    """
    if run.repeats > 1 and not sampling.temperature:
        raise UsageError("--repeats needs --temperature: greedy answers are all the same")
    if not chosen.shares:
        return
    if task.kind != "abacus" and calibration.kind == "abacus":
        raise UsageError(
            "--shares needs questions that are not evaluated: give --calibration.kind and "
            "--calibration.path, or --thresholds"
        )
    if (calibration.kind, calibration.path, calibration.split, calibration.seed) == (
        task.kind,
        task.path,
        task.split,
        task.seed,
    ) and calibration.where == task.where:
        raise UsageError(
            "--calibration names the questions that are evaluated: a threshold chosen on them "
            "proves nothing"
        )
