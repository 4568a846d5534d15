"""Files of a router checkpoint, read strictly and written whole or not at all; no pickle, ever."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.models.files import read_safetensors_header


def read_text(path: Path) -> str:
    """The file's text; raises CheckpointError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start})") from None


def read_tensors(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, which are exactly the `wanted` ones.

    Args:
        path: a safetensors file.
        wanted: tensors (on the meta device, say) whose names, shapes and dtypes the file must have.

    Raises:
        CheckpointError: not whole, not safetensors, a tensor too many or too few, another shape or
            dtype, NaN or Inf.
    """
    from safetensors import SafetensorError, safe_open

    read_safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, set(file.keys()), set(wanted))
            tensors = {}
            for name, like in wanted.items():
                view = file.get_slice(name)
                shape, dtype = list(view.get_shape()), view.get_dtype()
                if shape != list(like.shape):
                    raise CheckpointError(
                        f"{path}: {name} has shape {shape}, config.json wants {list(like.shape)}"
                    )
                if dtype != "F32":
                    raise CheckpointError(f"{path}: {name} has dtype {dtype}, wanted F32")
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} has NaN or infinite weights")
    return tensors


def _check_names(path: Path, found: set[str], wanted: set[str]) -> None:
    for problem, names in (("lacks", wanted - found), ("has an unknown", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise CheckpointError(f"{path}: {problem} tensor {shown}")


@contextmanager
def writing_folder(folder: Path, overwrite: bool, is_ours: str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, or leaves no trace if anything fails.

    Args:
        folder: where the files shall stand.
        overwrite: replace what is there.
        is_ours: a file that tells a folder of this kind; anything else is never overwritten.

    Raises:
        UsageError: `folder` is there and is not to be overwritten.
        CheckpointError: the disk is full, or not writable.
    """
    check_writable(folder, overwrite, is_ours)
    fresh = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if folder.exists():
            folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{folder}: could not be written: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_writable(folder: Path, overwrite: bool, is_ours: str) -> None:
    """Raises UsageError where `writing_folder` would; cheap, for the moment before long work."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / is_ours).is_file():
        raise UsageError(f"{folder} is there and holds something else: choose another folder")
    if not overwrite:
        raise UsageError(f"{folder} is there already: choose another folder, or --overwrite")
