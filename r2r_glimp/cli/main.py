"""The dispatcher: `r2r-glimp VERB ...`.

Imports nothing but the standard library and the errors, so that help is there at once; a verb's
module is imported when the verb is called.
"""

import difflib
import sys
from importlib import import_module

from r2r_glimp import __version__
from r2r_glimp.cli.errors import PROG, run_guarded
from r2r_glimp.core import UsageError

# A verb is one line: its name, the module whose `run(argv) -> exit code` does it, and what it does.
VERBS = (
    ("generate", "r2r_glimp.cli.generate", "write with the pair: a prompt, a file, or JSONL"),
    ("chat", "r2r_glimp.cli.chat", "talk with the pair, turn by turn"),
    ("serve", "r2r_glimp.cli.serve", "put the pair behind OpenAI's HTTP protocol"),
    ("inspect", "r2r_glimp.cli.inspect", "look at a pair, a router, or who wrote what in outputs"),
    ("label", "r2r_glimp.cli.label", "label where the small model's choice changes the path"),
    ("fit", "r2r_glimp.cli.fit", "train a router on a labeled dataset"),
    ("calibrate", "r2r_glimp.cli.calibrate", "find the threshold for a share, a recall or a cost"),
    ("evaluate", "r2r_glimp.cli.evaluate", "how right and how cheap the pair is, with baselines"),
    ("bench", "r2r_glimp.cli.bench", "how fast this machine runs a pair, and compared with what"),
    ("push", "r2r_glimp.cli.push", "publish a router or a dataset on the Hub"),
    ("pull", "r2r_glimp.cli.pull", "fetch a router from the Hub"),
    ("import-r2r", "r2r_glimp.cli.import_r2r", "convert a router of the R2R project"),
    ("env", "r2r_glimp.cli.env", "what this machine has: versions, devices, memory"),
)
_MODULES = {name: module for name, module, _ in VERBS}

EXAMPLES = f"""\
examples:
  {PROG} generate $'Say hats 4.\\nSum cups: hats and 3.\\nHow many cups?'
  {PROG} generate --granularity step --router entropy --threshold 1.0 --file prompt.txt
  {PROG} generate --file prompts.jsonl --output answers.jsonl --trace
  {PROG} inspect answers.jsonl
  {PROG} chat --pair abacus"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0, 1 (failure), 2 (usage), or 128 + a signal's number.
    """
    argv, debug = _take_debug(sys.argv[1:] if argv is None else argv)
    return run_guarded(lambda: _dispatch(argv), debug=debug)


def help_text() -> str:
    """What `r2r-glimp --help` prints."""
    width = max(len(name) for name, _, _ in VERBS)
    lines = [f"  {name:<{width}}  {summary}" for name, _, summary in VERBS]
    return "\n".join(
        [
            f"usage: {PROG} VERB [options]        ({PROG} VERB --help tells a verb's options)",
            "",
            "A small and a large language model write one text together;",
            "a router decides who writes next.",
            "",
            "verbs:",
            *lines,
            "",
            "options:",
            "  --help     this text",
            "  --version  the version",
            "  --debug    anywhere: show tracebacks and what the libraries say",
            "",
            EXAMPLES,
        ]
    )


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(help_text(), file=sys.stderr)
        return 2
    verb, *rest = argv
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if verb not in _MODULES:
        close = difflib.get_close_matches(verb, _MODULES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(_MODULES)}"
        raise UsageError(f"unknown verb {verb!r}: {hint}")
    return import_module(_MODULES[verb]).run(rest)


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, and whether it was there; not looking behind `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept = [arg for arg in argv[:end] if arg != "--debug"]
    return kept + argv[end:], len(kept) < end


if __name__ == "__main__":
    sys.exit(main())
