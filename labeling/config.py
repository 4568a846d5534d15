"""What a labeling run is told, written as YAML. Imports no torch."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from labeling.sections import (
    BranchConfig,
    DrawConfig,
    EngineConfig,
    RayConfig,
    ResponseConfig,
    SourceConfig,
    VerifierConfig,
    require,
)
from r2r_glimp.core import UsageError

# What says where, how fast or how many, and changes no label. The models have fingerprints.
_NOT_IDENTITY = (
    *("pair", "out", "device", "engine", "limit", "num_shards", "shard_index", "overwrite"),
    *("executor", "ray", "json", "debug"),
)
_NOT_IDENTITY_OF_JUDGE = ("timeout_s", "retries", "concurrency", "api_key_env", "max_unparsable")


@dataclass(frozen=True, kw_only=True)
class LabelingConfig:
    """Label where the SLM's choice changes the path of an answer.

    Args:
        pair: a pair's name (a file of configs/pairs), or a YAML file.
        out: folder of shards, dataset and report.
        device: of both models; null is the pair's own.
        dtype: of both models; null is the pair's own.
        source: where the questions come from.
        responses: who answers them, and how.
        candidate: how the SLM's proposal at each position is picked.
        granularity: label tokens, steps, or both.
        delimiter: what ends a step, one of blank_line, newline, sentence, regex:PATTERN.
        max_step_tokens: a longer step is cut here.
        branches: how far the LLM goes on after the SLM's choice.
        verifier: what tells a neutral difference from a divergent one.
        top_k_logits: how many of the SLM's highest logits a row keeps.
        hidden_layer: of which of the SLM's layers a row keeps the output, counted from 1; null is
            the last hidden state, after the final norm.
        engine: what the engine may use.
        executor: local, one shard after another in this process, or ray, on a Ray cluster.
        ray: settings of executor=ray.
        shard_size: questions of one shard, the unit that is finished or done again.
        limit: label only the first so many questions.
        num_shards: share the shards among so many processes, on one folder.
        shard_index: which of them this process is, from 0.
        overwrite: throw away what a run left in the folder, and start again.
        json: print the summary on stdout as JSON.
        debug: show the whole traceback of an error.
    """

    pair: str = "abacus"
    out: str = "runs/labels"
    device: str | None = None
    dtype: str | None = None
    source: SourceConfig = field(default_factory=SourceConfig)
    responses: ResponseConfig = field(default_factory=ResponseConfig)
    candidate: DrawConfig = field(default_factory=DrawConfig)
    granularity: Literal["token", "step", "both"] = "both"
    delimiter: str = "blank_line"
    max_step_tokens: int = 512
    branches: BranchConfig = field(default_factory=BranchConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    top_k_logits: int = 32
    hidden_layer: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    executor: Literal["local", "ray"] = "local"
    ray: RayConfig = field(default_factory=RayConfig)
    shard_size: int = 64
    limit: int | None = None
    num_shards: int = 1
    shard_index: int = 0
    overwrite: bool = False
    json: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("max_step_tokens", "shard_size", "num_shards", "top_k_logits", "hidden_layer"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "1 or more")
        inside = 0 <= self.shard_index < self.num_shards
        require(inside, "shard_index", self.shard_index, f"0 to {self.num_shards - 1}")
        if self.verifier.kind == "answer" and self.branches.until != "answer":
            raise UsageError(
                "verifier.kind=answer compares final answers, but branches.until="
                f"{self.branches.until}: set it to answer, or choose the verifier judge"
            )
        if self.executor == "ray" and self.num_shards > 1:
            raise UsageError(
                f"num_shards={self.num_shards} shares the work among processes you start, and "
                "executor=ray shares it itself: drop one of them"
            )
        if self.overwrite and self.num_shards > 1:
            raise UsageError(
                "overwrite would throw away what the other processes write: delete the folder "
                "of --out first"
            )

    @property
    def label_tokens(self) -> bool:
        """Whether tokens are labeled."""
        return self.granularity != "step"

    @property
    def label_steps(self) -> bool:
        """Whether steps are labeled."""
        return self.granularity != "token"

    @property
    def out_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.out).expanduser()

    def identity(self) -> dict[str, Any]:
        """What decides the labels, beside the models."""
        values = asdict(self)
        for name in _NOT_IDENTITY:
            del values[name]
        for name in _NOT_IDENTITY_OF_JUDGE:
            del values["verifier"]["judge"][name]
        del values["source"]["count"]  # a limit too
        return values
