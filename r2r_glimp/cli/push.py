"""`r2r-glimp push PATH REPO`: publish a router or a labeled dataset on the Hub.

Everything is checked and rendered before the network is touched; --dry_run shows what would go up
and stops there. The token is the one of `hf auth login` or HF_TOKEN.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from r2r_glimp.cli.parser import Parser

if TYPE_CHECKING:
    from r2r_glimp.hub.publish import Publication

EXAMPLES = (
    "checkpoints/abacus-token-router you/abacus-token-router --dry_run",
    "checkpoints/abacus-token-router you/abacus-token-router --private",
    "runs/labels/abacus you/abacus-labels --revision v1",
)


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("push", "PATH REPO [options]", __doc__ or "", EXAMPLES)
    text = "folder of a router, of a labeling run, or of a dataset with its card"
    parser.add_argument("path", type=str, metavar="PATH", help=text)
    parser.add_argument("repo", type=str, metavar="REPO", help="Hub id: ORG/NAME")
    parser.add_flag(parser, "dry_run", "show what would be uploaded, without the network")
    parser.add_flag(parser, "private", "make the repository private")
    text = "branch to push to, made if it is not there (default: main)"
    parser.add_argument("--revision", type=str | None, metavar="BRANCH", help=text)
    parser.add_flag(parser, "json", "one JSON object on stdout")
    return parser


def run(argv: list[str]) -> int:
    """The verb."""
    options = build_parser().parse(argv)
    from labeling.card import export_run, is_run
    from r2r_glimp.hub.publish import check_repo_id, publish_dataset, push

    how = {name: options[name] for name in ("private", "revision", "dry_run")}
    path = Path(options.path)
    if is_run(path):
        check_repo_id(options.repo)  # before any work
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "dataset"
            export_run(path, folder)
            publication = publish_dataset(folder, options.repo, **how)
    elif any(path.glob("data/*.parquet")):
        publication = publish_dataset(path, options.repo, **how)
    else:
        publication = push(path, options.repo, **how)
    print(_describe(publication, options.dry_run), file=sys.stderr)
    if options.json:
        print(json.dumps(asdict(publication), ensure_ascii=False))
    return 0


def _describe(publication: "Publication", dry_run: bool) -> str:
    """What went up, or would, for people."""
    kind = "private " * publication.private + publication.repo_type
    verb = "would push" if dry_run else "pushed"
    lines = [f"{verb} the {kind} {publication.repo_id}, branch {publication.revision}:"]
    lines += [f"  {f.num_bytes:>12,} bytes  {f.name}  {f.sha256[:12]}" for f in publication.files]
    if publication.url:
        lines.append(publication.url)
    return "\n".join(lines)
