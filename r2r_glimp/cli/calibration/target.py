"""What a calibration aims at. Imports no torch: a command line is checked before anything loads."""

import math
from dataclasses import dataclass
from typing import Literal

from r2r_glimp.core import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """What is wanted.

    Args:
        target_llm_share: LLM-written tokens / generated tokens; several are searched together and
            the first is the default.
        target_recall: share of the divergent decisions of --labels that is deferred.
        target_avg_params: parameters that work on an average token (SLM + router + share x LLM),
            such as 1.5B; a plain number below 10,000 is billions.
        mixture: without labels and target, where the scores divide into sure and unsure (two
            Gaussians, as in STEER, arXiv 2511.06190).
        mixture_scale: of the scores that are fitted; auto is log, for a trained router logit.
        labels: labeled dataset, folder or Hub id, to tell recall and precision by.
        tolerance: relative error of the share that is good enough.
        max_steps: rounds of measurements at most.
    """

    target_llm_share: tuple[float, ...] = ()
    target_recall: float | None = None
    target_avg_params: str | float | None = None
    mixture: bool = False
    mixture_scale: Literal["auto", "linear", "log", "logit"] = "auto"
    labels: str | None = None
    tolerance: float = 0.02
    max_steps: int = 8

    def __post_init__(self) -> None:
        try:
            shares = tuple(dict.fromkeys(float(share) for share in self.target_llm_share))
        except (TypeError, ValueError):
            shares = (math.nan,)
        object.__setattr__(self, "target_llm_share", shares)
        others = (self.target_recall, self.target_avg_params)
        if bool(shares) + self.mixture + sum(one is not None for one in others) != 1:
            raise UsageError(
                "say what to aim at: one of --target_llm_share, --target_recall, "
                "--target_avg_params and --mixture"
            )
        for name, value in (
            *(("target_llm_share", share) for share in shares),
            ("target_recall", self.target_recall),
            ("tolerance", self.tolerance),
        ):
            if value is not None and not 0 < value < 1:
                raise UsageError(f"--{name} {value} is out of range: above 0, below 1")
        if self.max_steps < 1:
            raise UsageError(f"--max_steps {self.max_steps} is out of range: 1 or more")
        if self.target_recall is not None and self.labels is None:
            raise UsageError("--target_recall is told by labels: give --labels DATASET")
