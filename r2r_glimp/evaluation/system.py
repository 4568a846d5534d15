"""A system: one way of answering, with everything that decides its text."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from r2r_glimp.core import Granularity

ORACLE = "oracle"
BASELINES = ("slm", "llm")
FREE = ("random", "entropy", "margin")  # routers that nothing was trained for


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A router at a granularity and threshold.

    Attributes:
        router: a name, the folder or Hub id of a trained router, or `oracle`.
        granularity: None for the baselines, which never decide.
        threshold: None is the router's own.
        target_share: the LLM share the threshold was found for, None if it was given.
        matches: of a random router, the file name of the system whose LLM share it has.
    """

    router: str
    granularity: Granularity | None = None
    threshold: float | None = None
    target_share: float | None = None
    matches: str | None = None

    @property
    def name(self) -> str:
        """What tables call the router: its name, or the last part of its folder."""
        return self.router.rstrip("/").rpartition("/")[2]

    def matched_by_random(self, rate: float) -> "System":
        """Random decisions at this system's LLM share."""
        return System(
            router="random", granularity=self.granularity, threshold=rate, matches=self.slug
        )

    @property
    def slug(self) -> str:
        """A file name that no other system has."""
        parts = [self.name, self.granularity or ""]
        parts.append("" if self.target_share is None else f"{self.target_share:g}")
        decides = asdict(self)
        if self.matches is None:
            del decides["matches"]
        key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:6]
        return re.sub(r"[^\w.-]+", "-", "-".join(part for part in parts if part)) + f"-{key}"
