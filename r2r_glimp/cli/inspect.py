"""`r2r-glimp inspect THING`: look at a pair, a model, a router, at labels, or at who wrote what.

a pair's name or YAML file     both models, and whether they fit together; no weights are loaded
a folder or Hub id             a model, or a trained router
a folder of labels             class shares, and examples with both continuations to read
outputs.jsonl                  what `generate --output outputs.jsonl --trace` recorded

With --html, outputs are drawn into a page of one file, where a slider previews other thresholds;
labels become their report.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from r2r_glimp.cli.outputs import check_writable, to_json_line
from r2r_glimp.cli.parser import Parser
from r2r_glimp.core import UsageError

EXAMPLES = (
    "abacus",
    "qwen3-0.6b-8b --json",
    "checkpoints/abacus-token-router",
    "runs/labels/abacus --show 2",
    "answers.jsonl --show 2",
    "answers.jsonl --html answers.html",
    "trace.jsonl --signals",
)


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("inspect", "THING [options]", __doc__ or "", EXAMPLES)
    text = (
        "a pair's name or YAML file, folder or Hub id of a model or router, folder of labels, or "
        "JSONL of outputs"
    )
    parser.add_argument("thing", type=str, metavar="THING", help=text)
    text = "outputs of a JSONL file whose text is shown, the first ones; of labels, of each class"
    parser.add_argument("--show", type=int, default=1, metavar="N", help=text)
    text = "of a JSONL file: decisions listed for each of them"
    parser.add_argument("--decisions", type=int, default=20, metavar="N", help=text)
    text = "of a JSONL file or labels: draw all into this page"
    parser.add_argument("--html", type=str | None, metavar="FILE", help=text)
    parser.add_flag(parser, "overwrite", "replace that page if it is there")
    text = "of a JSONL file: H_init, and what the SLM says of steps once they are written"
    parser.add_flag(parser, "signals", text)
    parser.add_flag(parser, "no_color", "mark the LLM's text by brackets instead of colour")
    parser.add_flag(parser, "json", "one JSON object on stdout")
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    options = build_parser().parse(argv)
    for name in ("show", "decisions"):
        if options[name] < 0:
            raise UsageError(f"--{name} {options[name]} is out of range: 0 or more")
    if options.overwrite and options.html is None:
        raise UsageError("--overwrite goes with --html")
    facts, text = _look(options.thing, options)
    print(to_json_line(facts) if options.json else text)
    return 0


def _look(thing: str, options: Namespace) -> tuple[dict[str, Any], str]:
    """What a thing is, as plain values and as text."""
    from r2r_glimp.models.presets import preset_names

    path = Path(thing).expanduser()
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        from r2r_glimp.cli import recorded

        return recorded.inspect(path, options, sys.stdout)
    if options.signals:
        raise UsageError(f"--signals is for recorded outputs, and {thing} is no JSONL file")
    if _is_labels(path):
        return _look_at_labels(path, options)
    if options.html is not None:
        raise UsageError(f"--html draws recorded outputs or labels, and {thing} is neither")
    from r2r_glimp.cli import checkpoints

    if path.suffix in (".yaml", ".yml") or (thing in preset_names() and not path.is_dir()):
        return checkpoints.inspect_pair(thing)
    if not path.is_dir() and "/" not in thing:
        pairs = ", ".join(preset_names())
        raise UsageError(
            f"{thing}: nothing has this name: give a pair ({pairs}), a folder, a Hub id, or JSONL"
        )
    folder, revision = checkpoints.locate(thing)
    if is_router(folder):
        return checkpoints.inspect_router(thing, folder)
    return checkpoints.inspect_model(thing, folder, revision)


def is_router(folder: Path) -> bool:
    """Whether a folder's config.json is a router's."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "format_version" in config


def _is_labels(folder: Path) -> bool:
    """Whether a folder is a labeling run, its dataset, or a published one."""
    return (folder / "shards").is_dir() or (folder / "info.json").is_file()


def _look_at_labels(folder: Path, options: Namespace) -> tuple[dict[str, Any], str]:
    from labeling.report import load_summary, render_text

    page = None if options.html is None else Path(options.html)
    if page is not None:
        check_writable(page, overwrite=options.overwrite, option="--html")
    summary = load_summary(folder)
    if page is not None:
        from labeling.files import write_atomic
        from labeling.report_html import render_html

        write_atomic(page, render_html(summary).encode("utf-8", "replace"))
    text = f"labels {folder}\n{render_text(summary, num_examples=options.show)}"
    return {"kind": "labels", **summary}, text
