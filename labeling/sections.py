"""The sections of a labeling configuration: typed, checked where they enter. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from r2r_glimp.abacus.problems import LEVELS
from r2r_glimp.core import SamplingParams, UsageError

Until = Literal["sentence", "step", "answer"]
AnswerKind = Literal["abacus", "boxed", "choice", "number", "text", "math", "code"]


def require(ok: bool, name: str, value: Any, wanted: str) -> None:
    """Raises UsageError with the name, the value and what was wanted, unless `ok`."""
    if not ok:
        raise UsageError(f"{name}={value!r} is out of range: {wanted}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the questions come from.

    Args:
        kind: the abacus generator, a local file, or a dataset of the Hub (or a folder of one).
        path: file (.jsonl or .parquet), or dataset id; abacus has none.
        format: how a row becomes a question.
        name: what the dataset's column `source` says; null is the format's name.
        template: the prompt around the question, which stands where {question} is.
        answer: how a final answer is found in a text: the last boxed one, choice or number, all the
            text, or the last program (code); math is boxed, and compared in value where answers
            are graded; null is what the format knows.
        subset: of a Hub dataset.
        split: of a Hub dataset, or of abacus (train, validation, test).
        revision: of a Hub dataset; pin it to a commit to get the same questions again.
        data_files: of a Hub dataset, the files to read; null is what its card says.
        where: keep rows whose key has one of the values, such as {Year: [1983, 1984]}.
        id_key: format plain, key of the row's id; null numbers the rows.
        question_key: format plain, key of the question.
        answer_key: format plain, key of the right answer; null has none.
        response_key: key of an answer to label, for responses.by=input.
        count: abacus, how many problems.
        levels: abacus, difficulties, cycled through.
        seed: abacus, of the problems; gpqa, of the order of the choices.
    """

    kind: Literal["abacus", "file", "hub"] = "abacus"
    path: str | None = None
    format: Literal["plain", "aime", "gpqa", "bespoke-stratos", "livecodebench"] = "plain"
    name: str | None = None
    template: str = "{question}"
    answer: AnswerKind | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: list[str] | None = None
    where: dict[str, list[str | int | float | bool]] = field(default_factory=dict)
    id_key: str | None = "id"
    question_key: str = "question"
    answer_key: str | None = None
    response_key: str = "response"
    count: int = 1000
    levels: list[int] = field(default_factory=lambda: list(LEVELS))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind == "abacus":
            splits = ("train", "validation", "test")
            require(self.path is None, "source.path", self.path, "abacus has no file")
            require(self.split in splits, "source.split", self.split, ", ".join(splits))
            require(self.count >= 1, "source.count", self.count, "1 or more")
            levels = bool(self.levels) and all(1 <= level <= 8 for level in self.levels)
            require(levels, "source.levels", self.levels, "numbers from 1 to 8")
        else:
            require(bool(self.path), "source.path", self.path, f"kind={self.kind} needs one")
        once = self.template.count("{question}") == 1
        require(once, "source.template", self.template, "{question} must stand in it once")


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How tokens are picked.

    Args:
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this.
        top_k: keep the k likeliest tokens; 0 keeps all.
        min_p: drop tokens below this share of the likeliest token's probability.
        seed: of the drawing; each response draws from its own stream.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.sampling(1, 0)

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """The engine's parameters; raises UsageError if a value is out of range."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_tokens=max_tokens,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class ResponseConfig:
    """Who answers the questions, and how.

    Args:
        by: the llm, the routed pair (an on-policy round), or input (source.response_key).
        n: responses per question; more than one needs a temperature.
        max_tokens: longest response; longer ones are dropped and counted.
        sampling: how their tokens are picked.
        router: for by=pair, entropy, margin, random, or a trained router's folder or Hub id.
        granularity: for by=pair, token or step; null is the router's own.
        threshold: for by=pair; null is the router's own.
    """

    by: Literal["llm", "pair", "input"] = "llm"
    n: int = 1
    max_tokens: int = 512
    sampling: DrawConfig = field(default_factory=DrawConfig)
    router: str | None = None
    granularity: Literal["token", "step"] | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "responses.max_tokens", self.max_tokens, "1 or more")
        require(1 <= self.n <= 128, "responses.n", self.n, "1 to 128")
        if self.n > 1 and (self.sampling.temperature == 0 or self.by == "input"):
            raise UsageError(
                f"responses.n={self.n} would be {self.n} times the same text: "
                "set responses.sampling.temperature above 0, or n to 1"
            )
        if (self.by == "pair") != (self.router is not None):
            raise UsageError("responses.router and responses.by=pair go together: set both or none")


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """How far the LLM goes on after the SLM's choice.

    Args:
        until: to the end of the sentence, of the step, or of the answer.
        max_tokens: longest continuation.
    """

    until: Until = "answer"
    max_tokens: int = 512

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "branches.max_tokens", self.max_tokens, "1 or more")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The model that says whether two continuations mean the same.

    Args:
        url: base of an OpenAI-compatible endpoint (http://localhost:8000/v1); null asks a local
            model.
        model: its name there, or without url a folder or Hub id; null without url is the pair's
            own LLM.
        api_key_env: environment variable that holds the endpoint's key; null sends none.
        timeout_s: of one request.
        retries: after a time-out, a refused connection, 408, 429 or 5xx; waits double from 1 s.
        concurrency: requests to the endpoint at once.
        both_orders: ask twice, sentences swapped; two different verdicts give no label.
        max_tokens: of a verdict; more for a judge that thinks first.
        max_unparsable: share of differences without a readable verdict at which the run stops.
        context_chars: how much of the text before the difference the judge sees.
    """

    url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    timeout_s: float = 60.0
    retries: int = 6
    concurrency: int = 16
    both_orders: bool = True
    max_tokens: int = 16
    max_unparsable: float = 0.2
    context_chars: int = 4000

    def __post_init__(self) -> None:
        if self.url is not None:
            http = self.url.startswith(("http://", "https://"))
            require(http, "verifier.judge.url", self.url, "http://... or https://...")
            require(bool(self.model), "verifier.judge.model", self.model, "a url needs a model")
        least = {"retries": 0, "concurrency": 1, "max_tokens": 1, "context_chars": 0}
        for name, low in least.items():
            value = getattr(self, name)
            require(value >= low, f"verifier.judge.{name}", value, f"{low} or more")
        require(self.timeout_s > 0, "verifier.judge.timeout_s", self.timeout_s, "above 0")
        share = 0 <= self.max_unparsable <= 1
        require(share, "verifier.judge.max_unparsable", self.max_unparsable, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """What tells a neutral difference from a divergent one.

    Args:
        kind: answer (both branches reach the same final answer), judge (a model says), or
            identical (every difference is divergent, nothing is continued).
        judge: settings of kind=judge.
    """

    kind: Literal["answer", "judge", "identical"] = "answer"
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine may use; changes the speed, not the labels.

    Args:
        kv_memory: for the KV of both models.
        max_batch: sequences that run at once.
        max_batch_tokens: tokens of one forward pass.
        draft: how much of the answer's own text the LLM is offered as what may follow the SLM's
            choice, read in one pass and kept as far as it would have written it; 0 for none.
    """

    kv_memory: str = "1GiB"
    max_batch: int = 64
    max_batch_tokens: int = 2048
    draft: int = 64

    def __post_init__(self) -> None:
        require(self.draft >= 0, "engine.draft", self.draft, "0 or more")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where a Ray cluster is, and what one of its workers needs. The folder `out`, the pair and the
    source must be reachable from every node by the same names.

    Args:
        address: HOST:PORT of the cluster, or auto for the one this machine belongs to; null starts
            Ray on this machine, for this run.
        workers: how many load the pair and label; null is as many as the cluster has room for.
        cpus: CPU cores of one worker; its models compute with so many threads.
        gpus: GPUs of one worker; part of one where several workers share it.
        resources: custom resources of one worker, such as {h100: 1}.
        retries: how often a shard is begun again after its worker died.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    retries: int = 3

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, "ray.workers", self.workers, "1 or more")
        least = {"cpus": self.cpus, "gpus": self.gpus, "retries": self.retries, **self.resources}
        for name, value in least.items():
            require(value >= 0, f"ray.{name}", value, "0 or more")
        require(any(self.needs.values()), "ray.cpus", self.cpus, "a worker must need something")

    @property
    def needs(self) -> dict[str, float]:
        """What one worker occupies, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
