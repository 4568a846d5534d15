"""Align the SLM with the LLM: `python -m training.align --config FILE`, a preset being
`configs/training/abacus-align.yaml`.

    the LLM's responses ─▶ ResponseData ─▶ AlignModule (SLM + LoRA) ─▶ adapter, a safetensors folder

Fewer tokens diverge to begin with, so a router has less to defer. The pair takes the adapter as
`slm_adapters`; a router trained without it is refused with it, and the other way round.

Exit codes: 0; 1 failure; 2 the input is wrong, one line says what; 130 and 143 a signal ended the
run, which `--ckpt_path last` then continues exactly.
"""

import sys
import traceback

from r2r_glimp.core import EngineError, R2RGlimpError, UsageError
from r2r_glimp.models.source import one_line
from training.interrupt import Interrupted

PROG = "python -m training.align"


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

        from training.align_run import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("lightning", "torchmetrics", "peft"):
            raise
        raise UsageError(f"{error.name} is not installed: pip install 'r2r_glimp[train]'") from None
    try:
        return run(argv, PROG)
    except MisconfigurationException as error:
        raise UsageError(one_line(error)) from error


if __name__ == "__main__":
    sys.exit(main())
