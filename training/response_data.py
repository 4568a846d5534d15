"""The data of an alignment: the LLM's responses in three splits, as padded batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2r_glimp.core import DataError, UsageError
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.models.loading import load_model
from r2r_glimp.models.pair import LoadedModel, ModelPair
from r2r_glimp.models.placement import per_model
from r2r_glimp.models.presets import read_preset
from training.data import SelectionBatches, TrainBatches
from training.responses import Response, read_labeled, write_responses
from training.rows import SPLITS


@dataclass(slots=True)
class TextBatch:
    """B responses of up to T tokens, padded behind: ids, and which of them the LLM wrote."""

    ids_BT: Tensor
    written_BT: Tensor


@dataclass(frozen=True, slots=True)
class TextSplit:
    """Places of a split's responses."""

    name: str
    rows: NDArray[np.int64]


class ResponseData(L.LightningDataModule):
    """Responses of the LLM.

    Args:
        pair: name or YAML file of the pair whose SLM is aligned.
        path: folder of a labeling run, whose responses are taken; None lets the LLM write some to
            abacus problems.
        count: without a path, to how many.
        problem_seed: without a path, of the problems.
        max_tokens: longer responses are left out.
        batch_size: responses per step and process.
        selection: share of the questions that choose the checkpoint.
        test: share of the questions that nothing is chosen by.
        split_seed: another one, another split.
        seed: of the order of the responses.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        pair: str = "abacus",
        path: str | None = None,
        count: int = 4000,
        problem_seed: int = 0,
        max_tokens: int = 512,
        batch_size: int = 32,
        selection: float = 0.1,
        test: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"count": count, "batch_size": batch_size, "max_tokens": max_tokens}
        for name, value in least.items():
            if value < 1:
                raise UsageError(f"data.{name}={value} is out of range: 1 or more")
        if not (0 < selection < 1 and 0 < test < 1 and selection + test < 1):
            raise UsageError(
                f"data.selection={selection} and data.test={test} leave no split to train on"
            )
        self.pair_name, self.path, self.count = pair, path, count
        self.problem_seed, self.max_tokens = problem_seed, max_tokens
        self.batch_size, self.fractions = batch_size, (selection, test)
        self.split_seed, self.seed = split_seed, seed
        self.folder = Path("runs")
        self.splits: dict[str, TextSplit] = {}
        self.responses: list[Response] = []
        self.llm: Fingerprint | None = None

    def load(self) -> LoadedModel:
        """The SLM in float32, after the responses have been read or written.

        Raises:
            UsageError, DataError, CheckpointError, EngineError: the pair or the responses are
                missing, broken or do not fit.
        """
        preset = read_preset(self.pair_name)
        if self.path is None:
            pair = ModelPair.from_pretrained(**preset)
            self.llm = pair.llm.fingerprint
            self.responses = write_responses(
                pair,
                self.folder,
                count=self.count,
                problem_seed=self.problem_seed,
                max_tokens=self.max_tokens,
            )
            del pair
        # Once more, in the dtype that it is trained in; adapters of the preset are merged below.
        slm = LoadedModel(
            *load_model(
                preset["slm"],
                device=torch.device("cpu"),
                dtype=torch.float32,
                revision=per_model("revision", preset.get("revision"), None)[0],
                adapters=preset.get("slm_adapters", []),
                trust_remote_code=preset.get("trust_remote_code", False),
            )
        )
        if self.path is not None:
            self.responses = read_labeled(self.path, slm)
        self._split(slm)
        return slm

    def _split(self, slm: LoadedModel) -> None:
        room = slm.context_length
        kept = [
            r
            for r in self.responses
            if len(r.tokens) <= self.max_tokens and len(r.prompt) + len(r.tokens) <= room
        ]
        self.responses = kept
        selection, test = self.fractions
        place = np.array([response.place(self.split_seed) for response in kept])
        split_of = np.where(place < test, 2, np.where(place < test + selection, 1, 0))
        for i, name in enumerate(SPLITS):
            rows = np.flatnonzero(split_of == i)
            if not len(rows):
                raise DataError(
                    f"the {name} split has none of {len(kept)} responses: more of them are needed, "
                    "or a larger data.max_tokens"
                )
            self.splits[name] = TextSplit(name, rows)

    def batch(self, split: str, index: NDArray[np.int64]) -> TextBatch:
        """The responses at these places of a split."""
        chosen = [self.responses[i] for i in self.splits[split].rows[index]]
        longest = max(len(r.prompt) + len(r.tokens) for r in chosen)
        ids_BT = torch.zeros(len(chosen), longest, dtype=torch.long)
        written_BT = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for i, r in enumerate(chosen):
            end = len(r.prompt) + len(r.tokens)
            ids_BT[i, :end] = torch.tensor(r.prompt + r.tokens)
            written_BT[i, len(r.prompt) : end] = True
        return TextBatch(ids_BT, written_BT)

    def batches(
        self, split: str, batch_size: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[TextBatch]:
        """A split in order, or process `rank`'s share of it."""
        size = batch_size or self.batch_size
        mine = np.arange(rank, len(self.splits[split].rows), world)
        for start in range(0, len(mine), size):
            yield self.batch(split, mine[start : start + size])

    # The order of a router's rows, of which they only need the number, serves here as well.
    def train_dataloader(self) -> Any:
        return TrainBatches(self)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return SelectionBatches(self)  # type: ignore[arg-type]
