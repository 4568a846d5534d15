"""`r2r-glimp calibrate`: the threshold for a wanted LLM share, recall or cost, on routed text.

The pair routes the prompts under one threshold after another until the share is met. A trained
router's checkpoint then holds the threshold, with its interval and the curve; for entropy and
margin a YAML file does, which `generate --config` takes.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from r2r_glimp.cli.calibration.prompts import ABACUS, PromptOptions, read_prompts
from r2r_glimp.cli.calibration.target import TargetOptions
from r2r_glimp.cli.options import (
    BASELINES,
    DEFAULT_PAIR,
    PairOptions,
    add_shared_options,
    default_router,
    load_engine,
    read_params,
)
from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import RoutingParams, SamplingParams, UsageError

if TYPE_CHECKING:
    from r2r_glimp.cli.calibration.results import Outcome
    from r2r_glimp.hub.checkpoint import RouterCheckpoint

EXAMPLES = (
    "--router entropy --granularity step --answer_by router --target_llm_share 0.1",
    "--router checkpoints/abacus-token-router --target_llm_share 0.05 --target_llm_share 0.1",
    "--router checkpoints/abacus-token-router --target_recall 0.95 "
    "--labels runs/labels/abacus/dataset",
    "--pair qwen3-0.6b-8b --router entropy --target_avg_params 1.5B --prompts questions.jsonl",
    "--router entropy --granularity step --mixture --fresh 500 --json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultOptions:
    """Where the result goes.

    Args:
        output: folder for a router's checkpoint (by default its own), or YAML file for a router
            without one (by default generate.yaml in the report).
        overwrite: replace what is there.
        report: folder of plots and CSV (by default runs/calibrate/ROUTER-GRANULARITY); what an
            earlier calibration left there is replaced.
        keep_default: a checkpoint's default threshold stays the one it is.
        json: one JSON object on stdout.
        quiet: no progress.
    """

    output: str | None = None
    overwrite: bool = False
    report: str | None = None
    keep_default: bool = False
    json: bool = False
    quiet: bool = False


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("calibrate", "TARGET [options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    for title, cls in (
        ("target: exactly one", TargetOptions),
        ("prompts", PromptOptions),
        ("result", ResultOptions),
    ):
        parser.add_fields(parser.add_argument_group(title), cls)
    add_shared_options(parser)
    parser.set_defaults(max_batch=64)
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    started = time.monotonic()
    options = build_parser().parse(argv)
    target, where = pick(TargetOptions, options), pick(ResultOptions, options)
    sampling, routing = read_params(options)
    _check(options, sampling, routing)
    is_abacus = options.pair in (None, DEFAULT_PAIR) and options.slm is None
    chosen = pick(PromptOptions, options)
    if is_abacus and chosen.prompts is None:
        chosen = dataclasses.replace(chosen, prompts=ABACUS)
    prompts = read_prompts(chosen, target.labels, sampling, routing)
    name = options.router or default_router(options, options.granularity)
    checkpoint, source = _read_checkpoint(name)
    report = Path(where.report or _report_folder(name, source, checkpoint, options))
    goal = Path(where.output or (report / "generate.yaml" if source is None else name))
    if source is not None and where.output is None and not Path(name).is_dir():
        raise UsageError(f"{name} lies on the Hub: give --output, a folder for the calibrated one")
    from r2r_glimp.cli.calibration.store import check_target

    if report.exists() and not report.is_dir():
        raise UsageError(f"--report {report} is a file: give a folder")
    check_target(source, goal, overwrite=where.overwrite or where.output is None)
    engine = load_engine(options)
    from r2r_glimp.cli.calibration.job import Job

    job = Job(engine, target, routing, prompts, checkpoint, raw=chosen.raw, quiet=where.quiet)
    outcome = job.run()
    outcome.seconds = round(time.monotonic() - started, 1)
    outcome.report, outcome.stored = str(report), str(goal)
    _store(outcome, options, checkpoint, source, goal)
    _finish(outcome, report, as_json=where.json)
    return 0


def _check(options: Namespace, sampling: SamplingParams, routing: RoutingParams) -> None:
    if options.router in BASELINES:
        raise UsageError(f"--router {options.router} never decides: there is nothing to calibrate")
    for name, given in (
        ("threshold", routing.threshold is not None),
        ("trace", routing.trace),
        ("logprobs", sampling.logprobs is not None),
    ):
        if given:
            raise UsageError(f"--{name} is for generate, not for calibrate")


def _read_checkpoint(name: str) -> "tuple[RouterCheckpoint | None, Path | None]":
    """The trained router's checkpoint and the folder it was read from."""
    from r2r_glimp.routing.routers import NAMED_ROUTERS

    if name in NAMED_ROUTERS or ("/" not in name and not Path(name).exists()):
        return None, None  # `load_engine` says what is wrong with an unknown name
    from r2r_glimp.hub.checkpoint import read_checkpoint
    from r2r_glimp.models.source import locate

    folder, _ = locate(name)
    return read_checkpoint(folder), folder


def _report_folder(
    name: str, source: Path | None, checkpoint: "RouterCheckpoint | None", options: Namespace
) -> str:
    granularity = checkpoint.config.model.granularity if checkpoint else options.granularity
    return f"runs/calibrate/{Path(name).name}-{granularity or 'token'}"


def _store(
    outcome: "Outcome",
    options: Namespace,
    checkpoint: "RouterCheckpoint | None",
    source: Path | None,
    goal: Path,
) -> None:
    from r2r_glimp.cli.calibration import store

    if checkpoint is not None and source is not None:
        default = not options.keep_default
        store.store_checkpoint(outcome, checkpoint, source, goal, default=default)
        return
    given = dataclasses.asdict(pick(PairOptions, options))
    # Where it runs changes no share; what runs, and in which precision, does.
    pair = {k: v for k, v in given.items() if v and k not in ("device", "trust_remote_code")}
    pair = {k: list(v) if isinstance(v, tuple) else v for k, v in pair.items()}
    if "pair" not in pair and "slm" not in pair:
        pair = {"pair": DEFAULT_PAIR} | pair
    store.store_config(store.generate_config(outcome, pair, options.entropy_top_k), goal)


def _finish(outcome: "Outcome", report: Path, *, as_json: bool) -> None:
    from r2r_glimp.cli.calibration.plots import write_report

    write_report(outcome, report)
    for line in outcome.lines():
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps(outcome.to_dict(), allow_nan=False))
