"""Train a router: `python -m training.fit --config configs/training/abacus-token.yaml`.

    labeled dataset ─▶ RouterData ─▶ RouterModule ─▶ best weights ─▶ router checkpoint

Exit codes: 0; 1 failure; 2 the input is wrong, one line says what; 130 and 143 a signal ended the
run, which `--ckpt_path last` then continues exactly.
"""

import sys
import traceback

from r2r_glimp.core import EngineError, R2RGlimpError, UsageError
from r2r_glimp.models.source import one_line
from training.interrupt import Interrupted

PROG = "python -m training.fit"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    Args:
        argv: the arguments, without the program's name; None is the process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except R2RGlimpError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, EngineError) else 2
    except Interrupted as error:
        how = "--ckpt_path last goes on from here" if error.resumable else "nothing was saved"
        print(f"stopped by {error}: {how}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    try:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from training.run import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("lightning", "torchmetrics"):
            raise
        raise UsageError(f"{error.name} is not installed: pip install 'r2r_glimp[train]'") from None
    try:
        return run(argv, PROG)
    except MisconfigurationException as error:
        raise UsageError(one_line(error)) from error


if __name__ == "__main__":
    sys.exit(main())
