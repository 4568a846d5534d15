"""Shards: the units of a run that are finished or done again. Knows no models.

OUT/run.json              what decides the labels, configuration and models; written once
OUT/shards/00003.arrow    the rows of a shard, renamed into place when whole
OUT/manifest.jsonl        a line per finished shard: hashes, counts, seconds
OUT/.lock*                held while a process writes
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labeling.config import LabelingConfig
from labeling.files import full_disk_is_an_error, hash_file, write_atomic
from labeling.formats import Question
from r2r_glimp.core import DataError, UsageError

AGAIN = "give another --out, or start again with --overwrite"
_OWN = (
    *("run.json", "manifest.jsonl", "shards", "dataset", "dataset.partial"),
    *("info.json", "summary.json", "report.html"),
)


@dataclass(frozen=True, slots=True)
class Shard:
    """Some questions, by their place in the run."""

    index: int
    questions: list[Question]

    @property
    def input_sha256(self) -> str:
        """Of everything in the questions that can change the shard's rows."""
        kept = [[q.id, q.prompt, q.source, q.response] for q in self.questions]
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the manifest: a finished shard."""

    shard: int
    num_questions: int
    input_sha256: str
    run_sha256: str
    sha256: str
    num_bytes: int
    counts: dict[str, int]
    seconds: dict[str, float]


def plan(questions: list[Question], shard_size: int) -> list[Shard]:
    """Cut questions into shards."""
    starts = range(0, len(questions), shard_size)
    return [Shard(i, questions[start : start + shard_size]) for i, start in enumerate(starts)]


class ShardStore:
    """The folder of a run."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def path(self, index: int) -> Path:
        """A shard's file."""
        return self.out / "shards" / f"{index:05d}.arrow"

    @contextmanager
    def lock(self, config: LabelingConfig) -> Iterator[None]:
        """Hold the folder, or this process's part of it.

        Raises:
            UsageError: another process holds it, or it cannot be written.
        """
        try:
            (self.out / "shards").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(f"out={self.out} cannot be written: {reason}") from None
        if config.num_shards > 1:
            part = f".lock-{config.shard_index}-of-{config.num_shards}"
            with self._hold(".lock", fcntl.LOCK_SH), self._hold(part, fcntl.LOCK_EX):
                yield
            return
        with self._hold(".lock", fcntl.LOCK_EX):
            self.sweep()
            yield

    def sweep(self) -> None:
        """Remove what processes that were killed left half written; nobody may be writing."""
        for leftover in self.out.rglob("*.partial"):
            if leftover.is_file():
                leftover.unlink()

    @contextmanager
    def lock_build(self) -> Iterator[None]:
        """Wait for and hold the right to build the dataset."""
        with (self.out / ".lock-build").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _hold(self, name: str, kind: int) -> Iterator[None]:
        with (self.out / name).open("a+") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UsageError(
                    f"{self.out} is being written by {holder}: wait for it, or give another --out"
                ) from None
            if kind == fcntl.LOCK_EX:
                file.truncate(0)
                file.write(f"process {os.getpid()}")
                file.flush()
            yield

    def refuse_strangers(self) -> None:
        """Raises UsageError if the folder has files that no run of ours leaves without run.json."""
        if (self.out / "run.json").exists():
            return
        ours = ("shards", ".lock")
        names = sorted(path.name for path in self.out.iterdir())
        strange = [name for name in names if not name.startswith(ours)]
        if any(self.out.glob("shards/*.arrow")):
            strange.append("shards")
        if strange:
            raise UsageError(f"{self.out} holds {strange[0]}, but no run.json: {AGAIN}")

    def has_nothing(self) -> bool:
        """Whether a run was begun here that came to nothing: whatever it was, it binds nobody."""
        names = {path.name for path in self.out.iterdir() if not path.name.startswith(".lock")}
        return names == {"run.json", "shards"} and not any((self.out / "shards").iterdir())

    def check(self, run: Mapping[str, Any]) -> None:
        """Compare a run, or the part of it that is known yet, with the one begun here.

        Raises:
            UsageError: the folder holds another run.
        """
        path = self.out / "run.json"
        if not path.exists():
            return
        try:
            before = json.loads(path.read_bytes())
            before = {key: before[key] for key in run}
        except (ValueError, LookupError, TypeError):
            raise DataError(f"{path} is broken: {AGAIN}") from None
        if difference := find_difference(before, json.loads(json.dumps(run))):
            raise UsageError(
                f"{self.out} was begun with {difference.removeprefix('config.')}: finish it as it "
                f"was begun, {AGAIN}"
            )

    def start(self, run: Mapping[str, Any]) -> str:
        """Begin a run or go on with it; the hash of what decides its labels.

        Raises:
            UsageError: the folder holds another run.
        """
        self.check(run)
        text = json.dumps(run, indent=2, sort_keys=True) + "\n"
        if not (self.out / "run.json").exists():
            write_atomic(self.out / "run.json", text.encode())
        return hashlib.sha256(text.encode()).hexdigest()

    def clear(self) -> None:
        """Throw away what a run wrote, and nothing else."""
        for name in _OWN:
            path = self.out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.out / "shards").mkdir(exist_ok=True)

    def entries(self) -> dict[int, Entry]:
        """The last manifest line of each shard; a line cut short by a crash counts as none."""
        path = self.out / "manifest.jsonl"
        entries = {}
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                continue
            entries[entry.shard] = entry
        return entries

    def is_finished(self, shard: Shard, entry: Entry | None, run_sha256: str) -> bool:
        """Whether a shard's file is there, whole, and made of these questions by this run.

        Raises:
            UsageError: it was made of other questions.
        """
        if entry is None or entry.run_sha256 != run_sha256:
            return False
        if entry.input_sha256 != shard.input_sha256:
            if entry.num_questions == len(shard.questions):
                raise UsageError(
                    f"{self.out}: the questions of shard {shard.index} have changed since it was "
                    f"finished: {AGAIN}"
                )
            return False  # another limit: the shard has grown or shrunk
        path = self.path(shard.index)
        whole = path.exists() and path.stat().st_size == entry.num_bytes
        return whole and hash_file(path) == entry.sha256

    def record(self, entry: Entry) -> None:
        """Add a manifest line, in one write."""
        line = json.dumps(asdict(entry), sort_keys=True).encode() + b"\n"
        with full_disk_is_an_error(self.out), (self.out / "manifest.jsonl").open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line  # after a torn line
            file.write(line)


def find_difference(before: Any, now: Any, name: str = "") -> str | None:
    """The first value that differs between nested mappings, as `name=old, and now it is new`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{name}.{key}" if name else str(key)
            if found := find_difference(before.get(key), now.get(key), inner):
                return found
        return None
    return None if before == now else f"{name}={before!r:.40}, and now it is {now!r:.40}"
