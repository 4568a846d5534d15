"""Stage build: finished shards to one dataset on disk, with what it was made of beside it.

OUT/dataset/              a `datasets` dataset, mapped into memory by load_from_disk; rows as
                          in labeling.schema
OUT/dataset/info.json     models, configuration, counts: the same for the same rows
OUT/info.json             that, and the seconds of each stage, the command, versions
OUT/summary.json, OUT/report.html
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from labeling.config import LabelingConfig
from labeling.files import full_disk_is_an_error, write_atomic
from labeling.progress import no_bars
from labeling.report import summarize, write_report
from labeling.shards import Entry, ShardStore
from r2r_glimp.core import DataError
from r2r_glimp.hub.config import command_line
from r2r_glimp.models import Fingerprint

_FILE_BYTES = 256 * 2**20
_REASONS = {
    "dropped_unfinished": "unfinished (raise responses.max_tokens)",
    "dropped_no_answer": "without a final answer (is source.answer right?)",
    "unparsable": "differences without a verdict",
}


def build(
    store: ShardStore,
    config: LabelingConfig,
    entries: list[Entry],
    fingerprints: Mapping[str, Fingerprint | None],
) -> dict[str, Any]:
    """Build dataset and report from finished shards; the summary. What is built already stays.

    Raises:
        DataError: no row has a label.
    """
    counts = _add(entry.counts for entry in entries)
    if not counts.get("rows"):
        found = [f"{counts[key]} {words}" for key, words in _REASONS.items() if counts.get(key)]
        what = f"none of {counts.get('responses', 0)} responses could be labeled"
        raise DataError(f"{what}: {', '.join(found) or 'they are empty'}")
    digest = hashlib.sha256("".join(entry.sha256 for entry in entries).encode()).hexdigest()
    paths = [store.path(entry.shard) for entry in entries]
    summary = summarize(paths, counts, config)
    info = {
        "format": 1,
        "shards_sha256": digest,
        **{role: None if f is None else f.to_dict() for role, f in fingerprints.items()},
        "config": config.identity(),
        "counts": counts,
        "labels": summary["tokens"]["counts"],
        "step_labels": summary["steps"]["counts"],
    }
    with full_disk_is_an_error(store.out):
        if _digest_of(store.out / "dataset" / "info.json") != digest:
            _save_dataset(paths, store.out, info)
    seconds = {k: round(v, 3) for k, v in _add(entry.seconds for entry in entries).items()}
    versions = {name: version(name) for name in ("torch", "transformers", "datasets")}
    whole = info | {"seconds": seconds, "command": command_line("labeling"), "versions": versions}
    summary["seconds"] = seconds
    write_report(store.out, summary)
    write_atomic(store.out / "info.json", _json(whole))
    return summary


def _save_dataset(paths: list[Path], out: Path, info: dict[str, Any]) -> None:
    import datasets

    partial, final = out / "dataset.partial", out / "dataset"
    shutil.rmtree(partial, ignore_errors=True)
    parts = [datasets.Dataset.from_file(str(path)) for path in paths]
    whole = datasets.concatenate_datasets(parts)
    # The fingerprint is of the content, not of where the shards lie: same rows, same bytes.
    named = datasets.Dataset(
        whole.data,
        info=datasets.DatasetInfo(features=whole.features),
        fingerprint=info["shards_sha256"][:16],
    )
    with no_bars():
        named.save_to_disk(str(partial), num_shards=max(1, -(-whole.data.nbytes // _FILE_BYTES)))
    (partial / "info.json").write_bytes(_json(info))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _digest_of(path: Path) -> str | None:
    """Of which shards a dataset was built; None if that cannot be read."""
    try:
        return json.loads(path.read_bytes())["shards_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _add(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


def _json(value: Any) -> bytes:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "replace")
