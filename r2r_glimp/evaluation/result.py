"""What a system answered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r2r_glimp.core import AnswerBy
from r2r_glimp.evaluation.cost import Parameters
from r2r_glimp.evaluation.statistics import Floats
from r2r_glimp.evaluation.store import Sample
from r2r_glimp.evaluation.system import System
from r2r_glimp.routing.tags import ThinkTags

_CLOSE = ThinkTags().close


@dataclass(frozen=True, slots=True)
class Result:
    """A system's samples, the parameters it works with, and the seconds it took."""

    system: System
    samples: Sequence[Sample]
    parameters: Parameters
    seconds: float = 0.0

    def random_rate(self, answer_by: AnswerBy) -> float:
        """How often random decisions must go to the LLM for the same LLM share.

        What follows the thinking counts apart where no router decides on it; how much of a text
        that is, is told by its characters.

        Args:
            answer_by: who wrote it.
        """
        llm_tokens = sum(sample.llm_tokens for sample in self.samples)
        tokens = llm_tokens + sum(sample.slm_tokens for sample in self.samples)
        share = llm_tokens / max(1, tokens)
        if answer_by == "router":
            return share
        answers = sum(len(sample.text.partition(_CLOSE)[2]) for sample in self.samples)
        answer = answers / max(1, sum(len(sample.text) for sample in self.samples))
        decided = share - answer if answer_by == "llm" else share
        return min(1.0, max(0.0, decided) / max(1e-9, 1 - answer))

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
