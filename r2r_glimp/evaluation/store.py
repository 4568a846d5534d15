"""The folder of an evaluation: what was asked for, and a file of samples per system.

OUT/run.json                 what decides the texts; written once, another one is refused
OUT/samples/SYSTEM.jsonl     a line per answered question and repeat, appended as they finish
OUT/thresholds.json          what was found for the wanted shares
OUT/seconds.json             how long each system took, over all runs
OUT/summary.json, .md, *.png the tables and plots, made anew at every end
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r2r_glimp.core import DataError, UsageError
from r2r_glimp.evaluation.grading.grader import Grade

_OWN = (
    "run.json", "thresholds.json", "seconds.json", "samples", "summary.json", "summary.md",
    "share-*.png", "parameters-*.png",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answered question. Counts are tokens unless named otherwise; `note` is the grader's,
    `error` says why there is no answer, or no grade."""

    id: str
    repeat: int
    grade: Grade
    answer: str | None
    gold: str
    finish_reason: str
    slm_tokens: int
    llm_tokens: int
    switches: int
    decisions: int
    deferrals: int
    slm_computed: int
    llm_computed: int
    text: str
    note: str | None = None
    error: str | None = None
    elapsed_s: float = 0.0


class Store:
    """Reads and writes the folder.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; raises UsageError while another process does."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            file = (self.out / ".lock").open("w")
        except OSError as error:
            raise UsageError(f"--out {self.out}: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.out} is in use by another evaluation: give another --out"
                ) from None
            yield

    def start(self, run: dict[str, Any], *, overwrite: bool) -> None:
        """Begin, or go on where an evaluation of the same kind ended.

        Raises:
            UsageError: the folder holds something else, or an evaluation of another kind.
        """
        path = self.out / "run.json"
        if overwrite:
            for target in [path for name in _OWN for path in self.out.glob(name)]:
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        if path.exists():
            before = _read_json(path)
            changed = sorted(k for k in {*before, *run} if before.get(k) != run.get(k))
            if changed:
                raise UsageError(
                    f"{self.out} holds an evaluation with other {', '.join(changed)}: "
                    "give another --out, or start again with --overwrite"
                )
            return
        strangers = [p.name for p in self.out.iterdir() if p.name != ".lock"]
        if strangers:
            raise UsageError(f"{self.out} holds other files ({strangers[0]}): give another --out")
        (self.out / "samples").mkdir()
        self.write("run.json", json.dumps(run, indent=2) + "\n")

    def samples(self, slug: str) -> dict[tuple[str, int], Sample]:
        """What a system has answered so far; the torn last line of a killed run is dropped.

        Raises:
            DataError: a line is no sample.
        """
        path = self.out / "samples" / f"{slug}.jsonl"
        if not path.exists():
            return {}
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        found = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                sample = Sample(**json.loads(line))
            except (ValueError, TypeError):
                raise DataError(
                    f"{path}:{number}: not a sample: delete the line to have it done again"
                ) from None
            found[sample.id, sample.repeat] = sample
        return found

    def answered(self, slug: str) -> dict[tuple[str, int], Sample]:
        """The samples that need not be asked for again: those without an error."""
        return {key: s for key, s in self.samples(slug).items() if s.error is None}

    @contextmanager
    def writer(self, slug: str) -> Iterator["SampleWriter"]:
        """Appends samples of a system, each a whole line."""
        with (self.out / "samples" / f"{slug}.jsonl").open("ab", buffering=0) as file:
            yield SampleWriter(file.fileno())

    def thresholds(self) -> dict[str, float]:
        """Thresholds found earlier, by `ROUTER/granularity@share`."""
        path = self.out / "thresholds.json"
        return _read_json(path) if path.exists() else {}

    def seconds(self) -> dict[str, float]:
        """How long each system has taken so far, by its file's name."""
        path = self.out / "seconds.json"
        return _read_json(path) if path.exists() else {}

    def add_seconds(self, slug: str, seconds: float) -> None:
        """Count a run's time for a system."""
        known = self.seconds()
        known[slug] = round(known.get(slug, 0.0) + seconds, 3)
        self.write("seconds.json", json.dumps(known, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """A file, whole or not at all."""
        partial = self.out / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.out / name)


class SampleWriter:
    """Appends lines to an open file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def add(self, sample: Sample) -> None:
        """One line."""
        os.write(self._descriptor, (json.dumps(asdict(sample)) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise DataError(f"{path}: not valid JSON: start again with --overwrite") from None
