"""`r2r-glimp import-r2r FILE`: a router of the R2R project (`router.pt`) as a router checkpoint.

The file is a pickle; only plain weights are read from it, never code. It does not say which exact
models it was made for: --slm and --llm do, and the router is then refused on any other SLM.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from r2r_glimp.cli.parser import Parser

if TYPE_CHECKING:
    from r2r_glimp.models.fingerprint import Fingerprint

EXAMPLES = (
    "router.pt --out checkpoints/r2r-router",
    "router.pt --out checkpoints/r2r-router --slm deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
)


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("import-r2r", "FILE --out FOLDER [options]", __doc__ or "", EXAMPLES)
    parser.add_argument("file", type=str, metavar="FILE", help="R2R's router.pt")
    parser.add_argument(
        "--out", type=str, required=True, metavar="FOLDER", help="folder of the checkpoint"
    )
    for name, size in (("slm", "small"), ("llm", "large")):
        text = f"folder or Hub id of the {size} model it was made for; its weights are not loaded"
        parser.add_argument(f"--{name}", type=str | None, metavar="MODEL", help=text)
    parser.add_flag(parser, "overwrite", "replace a router that is there")
    parser.add_flag(parser, "json", "one JSON object on stdout")
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    options = build_parser().parse(argv)
    from r2r_glimp.hub.checkpoint import CONFIG
    from r2r_glimp.hub.files import check_writable
    from r2r_glimp.hub.import_r2r import convert_r2r

    check_writable(Path(options.out), options.overwrite, is_ours=CONFIG)
    slm, llm = _fingerprint(options.slm), _fingerprint(options.llm)
    checkpoint = convert_r2r(options.file, slm, llm)
    checkpoint.save_pretrained(options.out, overwrite=options.overwrite)
    bound = "bound to its SLM" if slm else "it will serve any SLM of its width: give --slm"
    print(f"router {options.out}: {bound}", file=sys.stderr)
    print(f"next: r2r-glimp calibrate --router {options.out}", file=sys.stderr)
    if options.json:
        facts = {"path": options.out, "threshold": checkpoint.config.threshold.value}
        print(json.dumps(facts | {"bound": slm is not None}))
    return 0


def _fingerprint(name: str | None) -> "Fingerprint | None":
    if name is None:
        return None
    from r2r_glimp.cli import checkpoints
    from r2r_glimp.models.fingerprint import Fingerprint

    folder, revision = checkpoints.locate(name)
    facts, _ = checkpoints.inspect_model(name, folder, revision)
    return Fingerprint.from_dict(facts["fingerprint"])
