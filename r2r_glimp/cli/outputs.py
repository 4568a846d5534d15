"""Outputs as JSON lines: one object a line, written whole and at once."""

import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2r_glimp.core import Event, FinishEvent, RequestOutput, UsageError


def output_to_dict(output: RequestOutput, token_texts: list[str]) -> dict[str, Any]:
    """An output's fields as plain values; `logprobs` and `trace` only where they were asked for.

    Args:
        output: a finished completion.
        token_texts: what each token made readable, `""` amid a character; joined, the text.
    """
    record = asdict(output)
    record["stats"]["llm_share"] = output.stats.llm_share
    record["token_texts"] = token_texts
    for optional in ("logprobs", "trace"):
        if record[optional] is None:
            del record[optional]
    return record


def to_json_line(record: dict[str, Any]) -> str:
    """One line of valid JSON; NaN and infinities, which JSON has no word for, become null."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


class TokenTexts:
    """Gathers the text of each token from the events of many completions."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, int], list[str]] = defaultdict(list)

    def add(self, event: Event) -> list[str] | None:
        """All texts of a completion when it finishes, None before."""
        key = (event.request_id, event.index)
        if not isinstance(event, FinishEvent):
            self._texts[key].append(event.text)
            return None
        texts, text = self._texts.pop(key, []), event.output.text
        rest = text[sum(map(len, texts)) :]
        if rest and texts:  # text held back until the end
            texts[-1] += rest
        return texts


class LineWriter:
    """Writes lines to stdout, or to a file, which is looked at now and made by `open`.

    Raises:
        UsageError: the file cannot be made, or is there and not to be overwritten.
    """

    def __init__(self, path: str | None, *, overwrite: bool = False) -> None:
        self._path = None if path is None else Path(path)
        self._file: Any = None
        if self._path is not None:
            check_writable(self._path, overwrite=overwrite)

    @property
    def to_file(self) -> bool:
        return self._path is not None

    def open(self) -> None:
        """Make the file; call when nothing can be wrong with the input any more."""
        if self._path is not None:
            try:
                self._file = self._path.open("w", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--output {self._path}: {error.strerror}") from None

    def write(self, line: str) -> None:
        """One line, out at once."""
        file = self._file or sys.stdout
        file.write(line + "\n")
        file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def check_writable(path: Path, *, overwrite: bool, option: str = "--output") -> None:
    """Find out before anything is done for it.

    Raises:
        UsageError: the file cannot be made, or is there and not to be overwritten.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: give a file")
    if path.is_file() and not overwrite:
        raise UsageError(f"{option} {path} is there already: choose another file, or --overwrite")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written: permission denied")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
