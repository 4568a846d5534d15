"""`r2r-glimp bench WHAT`: how fast this machine runs a pair, against its limit and its peers.

decode     one model's decoding step, against the memory bandwidth and transformers
prefill    reading a long prompt, against transformers' forward pass; the prefix cache
route      a routed pair, against its ideal, the LLM alone and transformers
speculate  the LLM alone, and with an SLM that drafts for it and is right so often
label      what labeling does most: the LLM writes, the SLM reads
overhead   what the engine itself takes, with models that compute nothing
serve      what HTTP costs: clients of a server, against the same requests in the offline engine

Models have real shapes and random weights, nothing is downloaded; --pair takes a real pair. `serve`
serves one: abacus, if none is named.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import UsageError

BENCHES = ("decode", "prefill", "route", "speculate", "label", "overhead", "serve")
EXAMPLES = (
    "decode --slm_shape qwen3-0.6b",
    "decode --batch 8 --context 1024 --tokens 16",
    "route --slm_shape qwen3-0.1b --llm_shape qwen3-1.7b --share 0.124 --tokens 128",
    "route --granularity step --share 0.25 --step_tokens 40 --tokens 400 --no_peers",
    "overhead --batch 16 --json --plot overhead.png",
    "serve --clients 16 --tokens 128",
)


def build_parser() -> Parser:
    """The options of this verb."""
    from r2r_glimp.bench.options import BenchOptions

    parser = Parser("bench", "WHAT [options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    parser.add_argument("what", type=str, metavar="WHAT", help=", ".join(BENCHES))
    parser.add_fields(parser, BenchOptions)
    parser.add_argument("--plot", type=str, metavar="FILE", help="PNG or SVG with the medians")
    parser.add_flag(parser, "json", "one JSON object on stdout")
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    options = build_parser().parse(argv)
    if options.what not in BENCHES:
        raise UsageError(f"no bench {options.what!r}: {', '.join(BENCHES)}")
    from r2r_glimp.bench.options import BenchOptions

    chosen = pick(BenchOptions, options)
    from r2r_glimp.bench.setting import Setting

    report = import_module(f"r2r_glimp.bench.{options.what}").run(Setting(chosen))
    print(json.dumps(report.to_dict()) if options.json else report.to_text())
    if options.plot:
        report.plot(Path(options.plot))
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0
