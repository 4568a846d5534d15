"""`r2r-glimp evaluate`: how right and how cheap the pair is, beside its baselines.

Systems answer the same questions; a table with intervals, paired tests and plots. A run that was
stopped goes on where it was.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from labeling.sections import SourceConfig
from r2r_glimp.cli.errors import say
from r2r_glimp.cli.evaluation.options import (
    RunOptions,
    SystemOptions,
    check_run,
    read_comparison,
    shared_routing,
)
from r2r_glimp.cli.options import EngineOptions, PairOptions, RouterOptions, load_pair, make_router
from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import RoutingParams, SamplingParams
from r2r_glimp.evaluation.system import BASELINES, ORACLE
from r2r_glimp.evaluation.task import GradingOptions, load_task

if TYPE_CHECKING:
    from r2r_glimp.evaluation.store import Store
    from r2r_glimp.evaluation.summary import Summary
    from r2r_glimp.models.pair import ModelPair

EXAMPLES = (
    "--config configs/evaluation/abacus.yaml",
    "--limit 100 --routers slm --routers llm --routers entropy --shares 0.2",
    "--config configs/evaluation/aime24.yaml --config configs/routing/glimprouter.yaml "
    "--pair glimprouter-qwen3-4b-thinking-r1-32b --repeats 4",
    "--pair mine.yaml --task.kind file --task.path questions.jsonl --task.answer_key answer "
    "--task.answer boxed --routers entropy --thresholds 0.5 --thresholds 1.0",
)


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("evaluate", "[options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    parser.add_fields(parser.add_argument_group("systems"), SystemOptions)
    parser.add_fields(parser.add_argument_group("run"), RunOptions)
    parser.add_class_arguments(SourceConfig, "task")
    parser.add_class_arguments(SourceConfig, "calibration")
    parser.add_fields(parser.add_argument_group("grading"), GradingOptions)
    parser.add_fields(parser.add_argument_group("models"), PairOptions)
    routing = parser.add_argument_group("routing: one more system, and limits of all")
    parser.add_fields(routing, RouterOptions)
    parser.add_fields(routing, RoutingParams, ("router", "trace"))
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
    """The verb; returns 1 if answers failed."""
    options = build_parser().parse(argv)
    run, sampling = pick(RunOptions, options), pick(SamplingParams, options)
    routing = pick(RoutingParams, options)
    wanted = read_comparison(options, routing)
    source, calibration = (
        SourceConfig(**options[name].as_dict()) for name in ("task", "calibration")
    )
    check_run(run, sampling, wanted.chosen, source, calibration)
    task = load_task(source, run.limit, pick(GradingOptions, options))

    from r2r_glimp.cli.evaluation.job import Job
    from r2r_glimp.cli.generate import has_chat_template
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.evaluation.run import Setting
    from r2r_glimp.evaluation.store import Store
    from r2r_glimp.evaluation.summary import summarise

    routers = {
        name: make_router(name, wanted.router.entropy_top_k)
        for name in wanted.routers
        if name not in (*BASELINES, ORACLE)
    }
    store = Store(Path(run.out or f"runs/evaluate/{task.name}"))
    with store.lock():
        pair = load_pair(pick(PairOptions, options))
        setting = Setting(
            sampling, shared_routing(routing), run.repeats, has_chat_template(pair) and not run.raw
        )
        decides = _what_decides(pair, source, run, setting, options)
        store.start(decides, overwrite=run.overwrite)
        engine = Engine(pair, router="entropy", **dataclasses.asdict(pick(EngineOptions, options)))
        job = Job(engine, task, setting, store, wanted, routers, calibration, quiet=run.quiet)
        try:
            results = job.run()
        finally:
            task.grader.close()
        about = _about(pair, argv)
        return _report(summarise(task.name, run.repeats, results, about), store, run)


def _what_decides(
    pair: "ModelPair", source: SourceConfig, run: RunOptions, setting: Any, options: Namespace
) -> dict[str, Any]:
    """What decides the texts, whatever the system: another one needs another folder."""
    decides = {
        "pair": [dataclasses.asdict(model.fingerprint) for model in (pair.slm, pair.llm)],
        "task": dataclasses.asdict(source) | {"limit": run.limit},
        "sampling": dataclasses.asdict(setting.sampling),
        "routing": dataclasses.asdict(setting.routing),
        "repeats": setting.repeats,
        "templated": setting.templated,
    }
    if options.entropy_top_k is not None:
        decides["entropy_top_k"] = options.entropy_top_k
    return dict(json.loads(json.dumps(decides, default=str)))


def _about(pair: "ModelPair", argv: list[str]) -> Mapping[str, Any]:
    """Where the figures come from."""
    from importlib.metadata import version

    return {
        "command": ["r2r-glimp", "evaluate", *argv],
        "slm": pair.slm.name,
        "llm": pair.llm.name,
        "dtype": [str(model.dtype).removeprefix("torch.") for model in (pair.slm, pair.llm)],
        "versions": {name: version(name) for name in ("r2r_glimp", "torch", "transformers")},
    }


def _report(summary: "Summary", store: "Store", run: RunOptions) -> int:
    from importlib.util import find_spec

    from r2r_glimp.evaluation.markdown import to_markdown

    text = json.dumps(summary.to_dict(), allow_nan=False)
    store.write("summary.json", text + "\n")
    store.write("summary.md", to_markdown(summary))
    if find_spec("matplotlib") is not None:
        from r2r_glimp.evaluation.plots import draw

        draw(summary, store.out)
    else:
        print("no plots: matplotlib is not installed (r2r_glimp[eval])", file=sys.stderr)
    print(text if run.json else to_markdown(summary), end="\n" if run.json else "")
    print(f"samples, tables and plots: {store.out}", file=sys.stderr)
    failed = sum(row.failed for row in summary.rows)
    if failed:
        answers = sum(row.answers for row in summary.rows)
        say(
            "warning" if run.allow_errors else "error",
            f"{failed} of {answers} answers failed ({summary.first_error}): they count as not "
            "right; the same command tries them again",
        )
    return 1 if failed and not run.allow_errors else 0
