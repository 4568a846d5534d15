"""`r2r-glimp label`: label where the small model's choice changes the path.

The same as `python -m labeling`.
"""

import io
import logging
from contextlib import redirect_stdout, suppress

from r2r_glimp.cli.errors import PROG

EXAMPLES = (
    "--config configs/labeling/abacus.yaml",
    "--config configs/labeling/abacus.yaml --limit 100 --out runs/try",
    "--config mine.yaml --num_shards 2 --shard_index 0",
)


def run(argv: list[str]) -> int:
    """The verb."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    from labeling.__main__ import main

    log = logging.getLogger("r2r_glimp")
    log.propagate = False  # labeling gives the root logger a handler: each warning once
    try:
        return main([*argv, *debug_flag()])
    finally:
        log.propagate = True


def help_text() -> str:
    """The labeling's own help, under this verb's name."""
    from labeling.__main__ import parse

    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        parse(["--help"])
    _, _, options = text.getvalue().partition("\n\n")
    examples = "\n".join(f"  {PROG} label {example}" for example in EXAMPLES)
    usage = f"usage: {PROG} label --config FILE [options]"
    return f"{usage}\n\n{options.rstrip()}\n\nexamples:\n{examples}"


def debug_flag() -> list[str]:
    """What passes `--debug` on, which the dispatcher took."""
    asked = logging.getLogger("r2r_glimp").isEnabledFor(logging.INFO)
    return ["--debug"] if asked else []
