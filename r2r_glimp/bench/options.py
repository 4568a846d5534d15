"""What can be asked of a bench. Imports no torch."""

from dataclasses import dataclass

from r2r_glimp.core import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured.

    Args:
        slm_shape: shape of the small model: a name, a config.json or its folder; random weights.
        llm_shape: shape of the large model.
        pair: a real pair instead: a preset or a YAML file.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """What `bench simulate` and `bench remote` are told. Where `simulate` is told no step times, it
    measures them, and what they foretell is held against a real run.

    Args:
        slm_ms: simulate: a pass of the SLM over one token.
        llm_ms: simulate, remote: a pass of the LLM over one token.
        slm_token_us: simulate: what each further token of the SLM's pass adds.
        llm_token_us: simulate: what each further token of the LLM's pass adds.
        overlap: simulate: the LLM has a device, or a server, of its own.
        users: simulate: requests at once.
        token_ms: simulate: say how many users get a token within this time.
        kv_tokens: simulate: tokens that the KV memory holds; by default all that are needed.
    """

    slm_ms: float | None = None
    llm_ms: float | None = None
    slm_token_us: float = 0.0
    llm_token_us: float = 0.0
    overlap: bool = False
    users: tuple[int, ...] = ()
    token_ms: float | None = None
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("slm_ms", "llm_ms", "token_ms", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name}={value} is out of range: above 0")
        for name in ("slm_token_us", "llm_token_us"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} is out of range: 0 or more")
        if any(users < 1 for users in self.users):
            raise UsageError(f"users={self.users} is out of range: 1 or more")
        stated = self.slm_ms is not None
        for name in ("overlap", "users", "token_ms", "kv_tokens"):
            if getattr(self, name) and not stated:
                raise UsageError(f"{name} goes with stated step times: give slm_ms and llm_ms")
