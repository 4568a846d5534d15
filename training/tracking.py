"""Where a run's curves go: Weights & Biases, online or offline, or a CSV file."""

import netrc
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from r2r_glimp.core import UsageError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

Mode = Literal["auto", "online", "offline", "off"]
PROJECT = "r2r_glimp"


def make_logger(mode: Mode, root: Path, name: str) -> "Logger":
    """The logger of a run; says in one line where the curves go when nothing was asked for.

    Args:
        mode: `auto` is W&B where it is installed, offline without a key; `off` is CSV.
        root: the run's folder.
        name: the run's name.

    Raises:
        UsageError: W&B was asked for and is not installed, or online and there is no key.
    """
    asked, found = mode, find_spec("wandb") is not None
    said = os.environ.get("WANDB_MODE", "").lower()
    if mode == "auto" and said in ("online", "offline", "disabled"):
        mode = "off" if said == "disabled" else said  # type: ignore[assignment]
    if mode in ("online", "offline") and not found:
        raise UsageError("W&B is not installed: pip install wandb, or --wandb off")
    if mode == "online" and not has_key():
        raise UsageError(
            "no W&B key: `wandb login`, or set WANDB_API_KEY, or --wandb offline, or --wandb off"
        )
    if mode == "auto":
        mode = "off" if not found else "online" if has_key() else "offline"
    if mode == "off":
        from lightning.pytorch.loggers import CSVLogger

        if asked == "auto":
            _say(f"W&B is off or not installed: curves go to {root / 'csv'}")
        return CSVLogger(root, name="csv")
    if mode == "offline" and asked == "auto":
        _say(f"no W&B key: curves stay in {root / 'wandb'}, `wandb sync` sends them later")
    from lightning.pytorch.loggers import WandbLogger

    root.mkdir(parents=True, exist_ok=True)
    return WandbLogger(name=name, project=PROJECT, save_dir=root, offline=mode == "offline")


def finish(exit_code: int) -> None:
    """End the W&B run of this process, if there is one, so that all of it is written."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)


def has_key() -> bool:
    """Whether W&B would find a key, in the environment or in ~/.netrc, without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = url.split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _say(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)
