"""`r2r-glimp bench WHAT`: how fast this machine runs a pair, against its limit and its peers.

decode     one model's decoding step, against the memory bandwidth and transformers
prefill    reading a long prompt, against transformers' forward pass; the prefix cache
route      a routed pair, against its ideal, the LLM alone and transformers
speculate  the LLM alone, and with an SLM that drafts for it and is right so often
label      what labeling does most: the LLM writes, the SLM reads
overhead   what the engine itself takes, with models that compute nothing
serve      what HTTP costs: clients of a server, against the same requests in the offline engine
remote     what a deferral over HTTP takes besides the LLM's own time, and what goes on meanwhile
simulate   how many users at which time per token, from step times; or foretold against a real run

Models have real shapes and random weights, nothing is downloaded; --pair takes a real pair.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import UsageError

BENCHES = (
    "decode", "prefill", "route", "speculate", "label", "overhead", "serve", "remote", "simulate",
)  # fmt: skip
EXAMPLES = (
    "decode --slm_shape qwen3-0.6b",
    "decode --batch 8 --context 1024 --tokens 16",
    "route --slm_shape qwen3-0.1b --llm_shape qwen3-1.7b --share 0.124 --tokens 128",
    "route --granularity step --share 0.25 --step_tokens 40 --tokens 400 --no_peers",
    "remote --slm_shape tiny --batch 64 --share 0.2",
    "simulate --slm_ms 6.0 --llm_ms 27.9 --share 0.35 --users 4 --users 8 --token_ms 25",
    "simulate --slm_shape tiny --llm_shape small --batch 4 --share 0.2",
    "overhead --batch 16 --json --plot overhead.png",
    "serve --slm_shape qwen3-0.1b --llm_shape qwen3-0.6b --clients 16",
)


def build_parser() -> Parser:
    """The options of this verb."""
    from r2r_glimp.bench.options import BenchOptions, SimulateOptions

    parser = Parser("bench", "WHAT [options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    parser.add_argument("what", type=str, metavar="WHAT", help=", ".join(BENCHES))
    parser.add_fields(parser, BenchOptions)
    parser.add_fields(parser, SimulateOptions)
    parser.add_argument("--plot", type=str, metavar="FILE", help="PNG or SVG with the medians")
    parser.add_flag(parser, "json", "one JSON object on stdout")
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    options = build_parser().parse(argv)
    if options.what not in BENCHES:
        raise UsageError(f"no bench {options.what!r}: {', '.join(BENCHES)}")
    from r2r_glimp.bench.options import BenchOptions, SimulateOptions

    chosen, simulate = pick(BenchOptions, options), pick(SimulateOptions, options)
    from r2r_glimp.bench.setting import Setting

    report = import_module(f"r2r_glimp.bench.{options.what}").run(Setting(chosen, simulate))
    print(json.dumps(report.to_dict()) if options.json else report.to_text())
    if options.plot:
        report.plot(Path(options.plot))
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0
