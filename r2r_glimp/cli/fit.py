"""`r2r-glimp fit`: train a router on a labeled dataset; the same as `python -m training.fit`.

Its help shows the options in the words of a preset, since asking the trainer itself would import
lightning, which takes seconds.
"""

from pathlib import Path

from r2r_glimp.cli.errors import PROG
from r2r_glimp.cli.label import debug_flag
from r2r_glimp.core import UsageError

PRESET = "abacus-token"
EXAMPLES = (
    "--config configs/training/abacus-token.yaml",
    "--config configs/training/abacus-step.yaml --data.path data/mine --export_dir mine",
    "--config configs/training/r2r-token.yaml --data.path data/mine --ckpt_path last --overwrite",
)
OPTIONS = """\
options of the run:
  -h, --help            this text; `python -m training.fit --help` lists every option there is
  -c, --config FILE     YAML file with options; may be repeated, later ones and the command line win
  --print_config        print the options after applying all others, and exit
  --overwrite           replace a router in export_dir
  --ckpt_path WHICH     resume: last, best or a file
  --dry_run             one batch, export untrained, exit
  --json                print the summary as JSON on stdout"""


def run(argv: list[str]) -> int:
    """The verb."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    from training.fit import main

    return main([*argv, *debug_flag()])


def help_text() -> str:
    """The run's options, and the preset's, whose comments say what each takes."""
    preset = find_preset(PRESET)
    lines = preset.read_text(encoding="utf-8").rstrip().splitlines()
    options = "\n".join(f"  {line}" for line in lines if not line.startswith("#"))
    examples = "\n".join(f"  {PROG} fit {example}" for example in EXAMPLES)
    return (
        f"usage: {PROG} fit --config FILE [options]\n\n"
        "Train a router on a labeled dataset, and export it as a router checkpoint.\n\n"
        f"{OPTIONS}\n\n"
        f"options in {preset.name} (on the command line, dotted: --model.width 128):\n"
        f"{options}\n\n"
        f"examples:\n{examples}"
    )


def find_preset(name: str) -> Path:
    """A file of `configs/training`: here, beside the package, or inside it.

    Raises:
        UsageError: there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (Path.cwd(), package.parent, package):
        path = root / "configs" / "training" / f"{name}.yaml"
        if path.is_file():
            return path
    raise UsageError(f"configs/training/{name}.yaml is missing: install r2r_glimp anew")
