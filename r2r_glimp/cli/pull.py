"""`r2r-glimp pull REPO`: fetch a router from the Hub into a folder, whole and checked."""

import json
import sys
from pathlib import Path

from r2r_glimp.cli.parser import Parser

EXAMPLES = (
    "you/abacus-token-router",
    "you/abacus-token-router --revision v1 --out checkpoints/mine",
)


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("pull", "REPO [options]", __doc__ or "", EXAMPLES)
    parser.add_argument("repo", type=str, metavar="REPO", help="Hub id: ORG/NAME")
    parser.add_argument(
        "--revision", type=str | None, metavar="REVISION", help="branch, tag or commit"
    )
    text = "folder (default: checkpoints/NAME)"
    parser.add_argument("--out", type=str | None, metavar="FOLDER", help=text)
    parser.add_flag(parser, "overwrite", "replace a router that is there")
    parser.add_flag(parser, "json", "one JSON object on stdout")
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    options = build_parser().parse(argv)
    from r2r_glimp.hub.publish import check_repo_id, pull

    check_repo_id(options.repo)
    folder = options.out or str(Path("checkpoints") / options.repo.rpartition("/")[2])
    pull(options.repo, folder, revision=options.revision, overwrite=options.overwrite)
    print(f"router {folder}; next: r2r-glimp inspect {folder}", file=sys.stderr)
    if options.json:
        print(json.dumps({"repo": options.repo, "revision": options.revision, "path": folder}))
    return 0
