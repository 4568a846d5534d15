"""Label where the SLM's choice changes the path: `python -m labeling --config FILE`.

Exit codes: 0; 1 something failed; 2 the command or its input is wrong, one line says what; 130 and
143 a signal ended the run, which the same command continues.
"""

import json
import logging
import signal
import sys
import traceback
from types import FrameType
from typing import Any

from labeling.config import LabelingConfig
from labeling.messages import explain
from r2r_glimp.core import EngineError, R2RGlimpError, UsageError

PROG = "python -m labeling"
FLAGS = ("--overwrite", "--json", "--debug")
AGAIN = "the same command goes on from here"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; its exit code.

    Args:
        argv: the arguments, without the program's name; None is the process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    before = signal.signal(signal.SIGTERM, _terminate)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    # A failing pass fails every request in it; the first one ends the run, and says so.
    engine_log = logging.getLogger("r2r_glimp.engine")
    level_before = engine_log.level
    engine_log.setLevel(logging.CRITICAL)
    try:
        return run(argv)
    except R2RGlimpError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, EngineError) else 2
    except KeyboardInterrupt:
        print(f"stopped by SIGINT: {AGAIN}", file=sys.stderr)
        return 128 + signal.SIGINT
    except _Terminated:
        print(f"stopped by SIGTERM: {AGAIN}", file=sys.stderr)
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
        engine_log.setLevel(level_before)


def run(argv: list[str]) -> int:
    """The verb: parse, label, say what came out.

    Raises:
        R2RGlimpError: each of one line.
    """
    config = parse(argv)
    from labeling.report import render_text
    from labeling.run import run as run_labeling

    summary = run_labeling(config)
    if summary is None:
        done = "the shards of this process are done"
        print(f"{done}; the dataset is built when the others are", file=sys.stderr)
        return 0
    print(render_text(summary), file=sys.stderr)
    out = config.out_dir
    print(f"dataset: {out / 'dataset'}   to read: {out / 'report.html'}", file=sys.stderr)
    if config.json:
        print(json.dumps(summary, ensure_ascii=False))
    return 0


def parse(argv: list[str]) -> LabelingConfig:
    """The configuration of a command line.

    Raises:
        UsageError: a key, a value or a file is wrong.
        SystemExit: --help or --print_config was asked for.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=PROG, description=__doc__, exit_on_error=False)
    text = "YAML file with options; may be repeated, later ones and the command line win"
    parser.add_argument("-c", "--config", action="config", metavar="FILE", help=text)
    parser.add_class_arguments(LabelingConfig, as_group=False)
    try:
        chosen: Any = parser.instantiate(parser.parse_args(_with_values(argv)))
    except ArgumentError as error:
        raise UsageError(explain(str(error))) from None
    del chosen["config"]
    return LabelingConfig(**vars(chosen))


def _with_values(argv: list[str]) -> list[str]:
    """`--overwrite` alone means `--overwrite=true`."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    return [
        f"{word}=true" if word in FLAGS and after not in ("true", "false") else word
        for word, after in pairs
    ]


class _Terminated(BaseException):
    """SIGTERM; not an Exception: nothing that handles failures may swallow it."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
