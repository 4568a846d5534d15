"""Files that are there whole or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2r_glimp.core import EngineError


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file; whoever looks sees the old one or the whole new one.

    Raises:
        EngineError: the disk is full.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with full_disk_is_an_error(path.parent):
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """Whatever cannot be written inside becomes an EngineError of one line."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"{folder} cannot be written: {error.strerror or error}; what is finished is kept: "
            "make room and run the same command again"
        ) from error
