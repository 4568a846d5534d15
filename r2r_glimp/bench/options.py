"""What can be asked of a bench. Imports no torch."""

from dataclasses import dataclass

from r2r_glimp.core import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured.

    Args:
        slm_shape: shape of the small model: a name, a config.json or its folder; random weights.
        llm_shape: shape of the large model.
        pair: a real pair instead: a preset or a YAML file; `serve` has abacus by default.
        device: auto, cpu, cuda or cuda:N.
        dtype: float32, bfloat16 or float16; with a pair also auto, what the checkpoint says.
        batch: requests at once.
        context: tokens of a prompt.
        tokens: tokens generated per request and repeat.
        repeats: interleaved repeats; the median counts.
        share: LLM share of a routed run; at step granularity the share of steps.
        granularity: token or step.
        step_tokens: length of a step.
        router: random, or entropy, margin, to see what scoring costs; they do not keep the share.
        speculate: drafts of the SLM for each pass of the LLM, in `speculate`.
        no_peers: do not measure what one would use instead.
        kernels: auto, amx, avx512, onednn or torch.
        graphs: on a GPU, CUDA graphs (default: true).
        threads: threads of torch; by default what it chooses.
        clients: of `serve`, each with one request after the other.
        requests: of `serve`, in a repeat; of `tokens` tokens on average.
    """

    slm_shape: str = "qwen3-0.6b"
    llm_shape: str = "qwen3-1.7b"
    pair: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    batch: int = 1
    context: int = 16
    tokens: int = 32
    repeats: int = 5
    share: float = 0.124
    granularity: str = "token"
    step_tokens: int = 40
    router: str = "random"
    speculate: int = 4
    no_peers: bool = False
    kernels: str = "auto"
    graphs: bool = True
    threads: int | None = None
    clients: int = 16
    requests: int = 64

    def __post_init__(self) -> None:
        counts = ("batch", "context", "tokens", "repeats", "step_tokens", "speculate")
        for name in (*counts, "clients", "requests"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is out of range: 1 or more")
        if not 0 <= self.share <= 1:
            raise UsageError(f"share={self.share} is out of range: 0 to 1")
        if self.granularity not in ("token", "step"):
            raise UsageError(f"granularity={self.granularity!r} is out of range: token or step")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads={self.threads} is out of range: 1 or more")
