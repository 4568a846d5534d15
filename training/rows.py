"""Rows of a labeled dataset, memory-mapped: whole batches by fancy indexing, no Python per row.

The wide columns stay on disk as the Arrow chunks they were written in; the narrow ones are read
once.

    hidden      chunk 0 [n0, H] │ chunk 1 [n1, H] │ …      uint16 views of the mapped file
    take(rows)  ──▶ rows grouped by chunk ──▶ [B, H] ──▶ bfloat16, no conversion

Shape suffixes: B rows of a batch, H hidden size, K top logits.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from labeling.schema import labeled_features
from r2r_glimp.core import DataError
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.models.source import one_line
from r2r_glimp.routing.features import FeatureSpec, Observation

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SPLITS = ("train", "selection", "test")
INFO = "info.json"


class WideColumn:
    """A fixed-width list column as numpy views of its Arrow chunks."""

    def __init__(self, column: "pa.ChunkedArray", width: int) -> None:
        filled = [chunk for chunk in column.chunks if len(chunk)]
        # flatten() heeds a slice's offset, values does not
        self.chunks = [chunk.flatten().to_numpy().reshape(-1, width) for chunk in filled]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in filled)])
        self.width = width

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The given rows, [B, width], in the order given."""
        out = np.empty((len(rows), self.width), self.chunks[0].dtype)
        chunk_of = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(chunk_of, kind="stable")
        touched, firsts = np.unique(chunk_of[order], return_index=True)
        for chunk, group in zip(touched, np.split(order, firsts[1:]), strict=True):
            out[group] = self.chunks[chunk][rows[group] - self.starts[chunk]]
        return out


class LabeledRows:
    """A labeled dataset, opened.

    Args:
        path: a folder written by `save_to_disk`, a folder of parquet files, or a Hub id.

    Attributes:
        hidden_size, top_k: widths of the wide columns.
        hidden_layer: whose output the hidden states are; None for the last, after the final norm.
        question, response: for each row, an index into `question_ids` and `response_ids`.
        split: for each row 0, 1 or 2 where the dataset comes split into SPLITS, else None.
        info: what `info.json` beside the data says, {} without.

    Raises:
        DataError: not there, not of the schema, empty, or with missing values.
    """

    def __init__(self, path: str) -> None:
        dataset, self.split = _merge(_open(path))
        self.path = path
        self.info = _read_info(path)
        self.hidden_size, self.top_k = _check_schema(dataset, path)
        self.hidden_layer: int | None = self.info.get("config", {}).get("hidden_layer")
        self.num_rows = len(dataset)
        if not self.num_rows:
            raise DataError(f"{path}: no rows: label something first")
        table = dataset.data.table
        for name in table.column_names:
            if table[name].null_count:
                raise DataError(f"{path}: column {name} has missing values")

        def narrow(name: str) -> NDArray[Any]:
            return table[name].to_numpy()

        self.hidden = WideColumn(table["hidden"], self.hidden_size)
        self.top_logits = WideColumn(table["top_logits"], self.top_k)
        self.entropy, self.margin = narrow("entropy"), narrow("margin")
        self.slm_token, self.position = narrow("slm_token"), narrow("position")
        self.phase, self.step_start = narrow("phase"), narrow("step_start")
        self.label, self.step_label = narrow("label"), narrow("step_label")
        self.question, self.question_ids = _codes(table["question_id"])
        self.response, self.response_ids = _codes(table["response_id"])

    def observe(self, rows: NDArray[np.int64], spec: FeatureSpec) -> Observation:
        """What `spec` looks at in the given rows."""

        def column(values: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(values[rows])

        bits_BH = torch.from_numpy(self.hidden.take(rows)) if spec.hidden else None
        top_BK = torch.from_numpy(self.top_logits.take(rows)) if spec.top_k_logits else None
        return Observation(
            hidden_NH=None if bits_BH is None else bits_BH.view(torch.bfloat16),
            top_logits_NK=top_BK,
            candidates_N=column(self.slm_token).long() if spec.candidate else None,
            entropy_N=column(self.entropy) if spec.entropy else None,
            margin_N=column(self.margin) if spec.margin else None,
        )

    def name_of(self, row: int) -> str:
        """How to find a row again."""
        response = self.response_ids[self.response[row]]
        return f"row {row} (response {response!r}, position {self.position[row]})"

    def fingerprint(self, model: str) -> Fingerprint | None:
        """The `slm` or `llm` that the data was made with, None where `info.json` does not say.

        Raises:
            CheckpointError: what it says is no fingerprint.
        """
        values = self.info.get(model)
        return None if values is None else Fingerprint.from_dict(values)


def _open(path: str) -> "Dataset | dict[str, Dataset]":
    import datasets

    folder = Path(path)
    parquet = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(path)
        if parquet:
            by_split = {
                split: [str(file) for file in parquet if file.name.startswith(split)]
                for split in SPLITS
            }
            split_files = {split: files for split, files in by_split.items() if files}
            whole = len(split_files) < 2
            return datasets.load_dataset(
                "parquet",
                data_files=[str(file) for file in parquet] if whole else split_files,
                split="train" if whole else None,
            )
        if folder.exists() or path.count("/") != 1 or path[0] in "./~" or folder.parent.is_dir():
            reason = "holds no dataset" if folder.is_dir() else "no such folder"
            raise DataError(f"{path}: {reason}: `python -m labeling` writes one")
        return datasets.load_dataset(path)
    except DataError:
        raise
    except IndexError:  # how load_from_disk says that there is no data file
        raise DataError(f"{path}: no rows: label something first") from None
    except Exception as error:  # Arrow, parquet, JSON and the network all fail in their own ways
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def _merge(
    dataset: "Dataset | dict[str, Dataset]",
) -> tuple["Dataset", NDArray[np.int8] | None]:
    """One dataset, and each row's split where it came as several."""
    from datasets import DatasetDict, concatenate_datasets

    if not isinstance(dataset, DatasetDict):
        return _flat(dataset), None
    if len(dataset) == 1:
        return _flat(next(iter(dataset.values()))), None
    if set(dataset) != set(SPLITS):
        wanted = ", ".join(SPLITS)
        raise DataError(f"splits {', '.join(dataset)}: either one, or exactly {wanted}")
    parts = [_flat(dataset[name]) for name in SPLITS]
    split = np.repeat(np.arange(3, dtype=np.int8), [len(part) for part in parts])
    return concatenate_datasets(parts), split


def _flat(dataset: "Dataset") -> "Dataset":
    """Without an indirection (`select`, `shuffle`) between its rows and its chunks."""
    return dataset if dataset._indices is None else dataset.flatten_indices()


def _check_schema(dataset: "Dataset", path: str) -> tuple[int, int]:
    """Hidden size and top-k of a dataset whose columns are those of `labeling.schema`."""
    features = dataset.features
    widths = [getattr(features.get(name), "length", -1) for name in ("hidden", "top_logits")]
    wanted = labeled_features(*(max(width, 1) for width in widths))
    for name, kind in wanted.items():
        if name not in features:
            raise DataError(f"{path}: no column {name}")
        if features[name] != kind:
            raise DataError(f"{path}: column {name} is {features[name]}, wanted {kind}")
    return widths[0], widths[1]


def _codes(column: "pa.ChunkedArray") -> tuple[NDArray[np.int32], Sequence[str]]:
    """A string column as indices into its distinct values."""
    encoded = column.dictionary_encode().unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return codes, encoded.chunk(0).dictionary.to_pylist()


def _read_info(path: str) -> dict[str, Any]:
    file = Path(path) / INFO if Path(path).exists() else _download_info(path)
    if file is None or not file.exists():
        return {}
    try:
        info = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(info, dict):
        raise DataError(f"{file} holds a {type(info).__name__} where a JSON object is wanted")
    return info


def _download_info(repo_id: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, INFO, repo_type="dataset"))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # a router without fingerprints must not come of a bad connection
        raise DataError(f"{repo_id}: {INFO} cannot be fetched: {one_line(error)}") from error
