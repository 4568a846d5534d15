"""What a system answered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r2r_glimp.evaluation.cost import Parameters
from r2r_glimp.evaluation.statistics import Floats
from r2r_glimp.evaluation.store import Sample
from r2r_glimp.evaluation.system import System


@dataclass(frozen=True, slots=True)
class Result:
    """A system's samples, the parameters it works with, and the seconds it took."""

    system: System
    samples: Sequence[Sample]
    parameters: Parameters
    seconds: float = 0.0

    @property
    def deferral_rate(self) -> float:
        """Share of the decisions that went to the LLM."""
        decisions = sum(sample.decisions for sample in self.samples)
        return sum(sample.deferrals for sample in self.samples) / max(1, decisions)

    def right(self, questions: Sequence[str]) -> Floats:
        """Share of right answers to each question, [Q]."""
        return self.mean_of(questions, [s.grade == "right" for s in self.samples])

    def mean_of(self, questions: Sequence[str], values: Sequence[float]) -> Floats:
        """Mean over the repeats of each question, [Q], of one value per sample."""
        places = {id: place for place, id in enumerate(questions)}
        sums, counts = np.zeros(len(questions)), np.zeros(len(questions))
        for sample, value in zip(self.samples, values, strict=True):
            sums[places[sample.id]] += value
            counts[places[sample.id]] += 1
        return sums / counts
