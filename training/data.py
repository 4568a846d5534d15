"""The data of a run: which rows are trained on, what is to be predicted, and in which order.

Splits go by question, so that no question is in two of them. The order of the training rows is a
function of (seed, epoch), and which batch is next is read off the trainer: a resumed run goes on
where it was.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r2r_glimp.core import DataError, Granularity, UsageError
from r2r_glimp.routing.features import FeatureSpec, Observation
from training.embedding import load_input_embedding
from training.rows import SPLITS, LabeledRows

Positive = Literal["divergent", "different"]
FIRST_POSITIVE_LABEL = {"divergent": 2, "different": 1}


@dataclass(slots=True)
class Batch:
    """B rows: what the router sees, 1.0 where it should defer, and how many tokens hang on it."""

    observation: Observation
    targets_B: Tensor
    weights_B: Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of the dataset that are decisions, with their targets and the tokens of their spans."""

    name: str
    rows: NDArray[np.int64]
    targets: NDArray[np.float32]
    weights: NDArray[np.float32]

    @property
    def num_positive(self) -> int:
        return int(self.targets.sum())


class RouterData(L.LightningDataModule):
    """A labeled dataset as batches.

    Args:
        path: folder or Hub id of the labeled dataset.
        granularity: `token` takes every row; `step` takes the rows where a labeled step starts.
        positive: `divergent`, or `different` to count neutral differences as well (the ablation).
        batch_size: rows per step and process.
        selection: share of the questions that choose the checkpoint and the threshold.
        test: share of the questions that nothing is chosen by.
        split_seed: another one, another split.
        seed: of the order of the rows.
        slm: folder or Hub id of the SLM, for its embedding; None is what the dataset says.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        path: str,
        granularity: Granularity = "token",
        positive: Positive = "divergent",
        batch_size: int = 1024,
        selection: float = 0.1,
        test: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        slm: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UsageError(f"data.batch_size={batch_size} is out of range: 1 or more")
        if not (0 < selection < 1 and 0 < test < 1 and selection + test < 1):
            raise UsageError(
                f"data.selection={selection} and data.test={test} leave no split to train on"
            )
        self.path = path
        self.granularity: Granularity = granularity
        self.positive: Positive = positive
        self.batch_size = batch_size
        self.fractions = (selection, test)
        self.split_seed = split_seed
        self.seed = seed
        self.slm = slm
        self.spec: FeatureSpec | None = None
        self.splits: dict[str, Split] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the dataset and split it; the second call does nothing.

        Raises:
            DataError: it cannot be read, or a split is empty, has one class, or shares a question.
        """
        if self.splits:
            return
        self.rows = rows = LabeledRows(self.path)
        decisions, targets, weights = self._decisions()
        split_of_row = rows.split if rows.split is not None else self._split_of_row()
        self._check_questions(split_of_row)
        for i, name in enumerate(SPLITS):
            chosen = split_of_row[decisions] == i
            split = Split(name, decisions[chosen], targets[chosen], weights[chosen])
            self._check_classes(split)
            self.splits[name] = split

    def input_embedding(self) -> Tensor:
        """The SLM's input embedding, bfloat16 [V, H].

        Raises:
            UsageError: the dataset does not say which SLM it is, or not where.
            CheckpointError: the SLM is not there, or not the one the dataset was made with.
        """
        fingerprint = self.rows.fingerprint("slm")
        name = self.slm or (fingerprint and fingerprint.name_or_path)
        if not name:
            raise UsageError(
                f"{self.path} does not say which SLM it is of: give its folder as data.slm"
            )
        embedding_VH = load_input_embedding(name, fingerprint)
        largest = int(self.rows.slm_token.max())
        if largest >= embedding_VH.shape[0]:
            raise DataError(f"{self.path}: slm_token {largest} is not in the vocabulary of {name}")
        return embedding_VH

    def batches(
        self, split: str, batch_size: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """A split in the dataset's order, or process `rank`'s share of it."""
        size = batch_size or self.batch_size
        mine = np.arange(rank, len(self.splits[split].rows), world)
        for start in range(0, len(mine), size):
            yield self.batch(split, mine[start : start + size])

    def batch(self, split: str, index: NDArray[np.int64]) -> Batch:
        """The rows at these places of a split."""
        assert self.spec is not None, "the module's prepare() comes first"
        part = self.splits[split]
        return Batch(
            self.rows.observe(part.rows[index], self.spec),
            torch.from_numpy(part.targets[index]),
            torch.from_numpy(part.weights[index]),
        )

    def train_dataloader(self) -> "TrainBatches":
        return TrainBatches(self)

    def val_dataloader(self) -> "SelectionBatches":
        return SelectionBatches(self)

    def _decisions(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Rows, targets, and tokens per decision."""
        rows, is_step = self.rows, self.granularity == "step"
        name, labels = ("step_label", rows.step_label) if is_step else ("label", rows.label)
        lowest = -1 if is_step else 0
        wrong = np.flatnonzero((labels < lowest) | (labels > 2))
        if len(wrong):
            at = rows.name_of(wrong[0])
            raise DataError(f"{self.path}: {at}: {name} is {labels[wrong[0]]}, not {lowest} to 2")
        spans = np.ones(rows.num_rows, np.float32)
        decisions = np.arange(rows.num_rows)
        if is_step:
            decisions = np.flatnonzero(rows.step_start & (rows.step_label >= 0))
            changes = (np.diff(rows.response, prepend=-1) != 0) | (
                np.diff(rows.phase, prepend=-1) != 0
            )
            starts = np.flatnonzero(rows.step_start | changes)
            spans[starts] = np.diff(starts, append=rows.num_rows)
        targets = labels[decisions] >= FIRST_POSITIVE_LABEL[self.positive]
        return decisions, targets.astype(np.float32), spans[decisions]

    def _split_of_row(self) -> NDArray[np.int8]:
        """0, 1 or 2 for each row: a hash of its question decides."""
        selection, test = self.fractions
        splits = []
        for question in self.rows.question_ids:
            digest = hashlib.sha256(f"{self.split_seed}/{question}".encode()).digest()
            place = int.from_bytes(digest[:8], "big") / 2**64
            splits.append(2 if place < test else 1 if place < test + selection else 0)
        return np.array(splits, np.int8)[self.rows.question]

    def _check_questions(self, split_of_row: NDArray[np.int8]) -> None:
        """No question in two splits, no response of two questions."""
        rows = self.rows
        leaked = _with_two(rows.question, split_of_row)
        if len(leaked):
            more = f" and {len(leaked) - 1} more" if len(leaked) > 1 else ""
            question = rows.question_ids[leaked[0]]
            raise DataError(f"{self.path}: question {question!r}{more} is in two splits: a leak")
        shared = _with_two(rows.response, rows.question)
        if len(shared):
            response = rows.response_ids[shared[0]]
            raise DataError(f"{self.path}: response {response!r} belongs to two questions")

    def _check_classes(self, split: Split) -> None:
        questions = len(self.rows.question_ids)
        if not len(split.rows):
            raise DataError(
                f"{self.path}: the {split.name} split has no {self.granularity} rows "
                f"({questions} questions in all): label more questions, or change "
                "data.selection and data.test"
            )
        if split.num_positive in (0, len(split.rows)):
            found = "only" if split.num_positive else "no"
            raise DataError(
                f"{self.path}: the {split.name} split has {found} {self.positive} rows among its "
                f"{len(split.rows)}, so nothing can be learnt or measured: label more questions"
            )


def _with_two(keys: NDArray[Any], values: NDArray[Any]) -> NDArray[np.int64]:
    """The keys (from 0) that stand beside more than one value (from 0)."""
    base = int(values.max()) + 1
    pairs = np.unique(keys.astype(np.int64) * base + values)
    return np.flatnonzero(np.bincount(pairs // base) > 1)


class TrainBatches:
    """The training split in an order that is a function of (seed, epoch).

    Holds no position: the next batch is the one that the trainer has not begun, so a run that
        resumes in the middle of
    an epoch continues with the very next rows. Under DDP a global batch is dealt out row by row; a
    last one with fewer rows than processes is left out.
    """

    def __init__(self, data: RouterData) -> None:
        assert data.trainer is not None
        self.data, self.trainer = data, data.trainer
        self.num_rows = len(data.splits["train"].rows)
        self._epoch, self._order = -1, np.empty(0, np.int64)
        world = self.trainer.world_size
        if self.num_rows < world:
            raise UsageError(f"{self.num_rows} training rows are too few for {world} processes")

    def __len__(self) -> int:
        whole, rest = divmod(self.num_rows, self.data.batch_size * self.trainer.world_size)
        return whole + (rest >= self.trainer.world_size)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        epoch, next_batch = self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1
        if next_batch >= len(self):
            raise StopIteration
        if epoch != self._epoch:
            rng = np.random.default_rng((self.data.seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(self.num_rows)
        size = self.data.batch_size * self.trainer.world_size
        mine = self._order[next_batch * size :][:size][
            self.trainer.global_rank :: self.trainer.world_size
        ]
        return self.data.batch("train", mine)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's counters say all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Tells Lightning that this can resume within an epoch."""


class SelectionBatches:
    """The selection split in the dataset's order, this process's share of it."""

    def __init__(self, data: RouterData) -> None:
        assert data.trainer is not None
        self.data, self.trainer = data, data.trainer

    def __len__(self) -> int:
        num_rows = len(self.data.splits["selection"].rows)
        mine = len(range(self.trainer.global_rank, num_rows, self.trainer.world_size))
        return -(-mine // self.data.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.trainer
        return self.data.batches("selection", None, trainer.global_rank, trainer.world_size)
