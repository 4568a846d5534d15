"""A tiny pair on disk, and `main` driven within this process."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from r2r_glimp.cli.main import main

Pipe = io.TextIOWrapper
SMALL = ("--kv_memory", "4MiB", "--max_tokens", "12", "--dtype", "float32")


class Terminal(io.TextIOWrapper):
    """A stdin at which somebody sits; what is typed comes from `input`."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> str:
        """The error, after a look that it is one line and that nothing else was said."""
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("r2r-glimp: error: "), self.err
        assert "internal error" not in lines[0]
        return lines[0].removeprefix("r2r-glimp: error: ")


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    tiny_model: Callable[..., PreTrainedModel],
) -> Path:
    """A folder with `slm`, `llm`, and `plain`, whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("slm", "llm", "plain")):
        tiny_model("qwen3", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "plain" / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="session")
def pair(models: Path) -> tuple[str, ...]:
    """Options that choose the tiny pair and keep a run small."""
    return ("--slm", str(models / "slm"), "--llm", str(models / "llm"), *SMALL)


@pytest.fixture
def cli(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """`cli("generate", "--json", "Hi", stdin=b"")`: the exit code and what was printed."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*args: object, stdin: bytes = b"", terminal: bool = False) -> Result:
        monkeypatch.setattr(sys, "stdin", Terminal() if terminal else Pipe(io.BytesIO(stdin)))
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """`spawn("generate", ...)`: the command as a process of its own."""

    def start(*args: object, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "r2r_glimp", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            cwd=Path(__file__).parents[2],
            **options,
        )

    return start


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`jsonl({"prompt": "a"}, b"raw")`: a file with a line each."""

    def write(*rows: dict[str, Any] | bytes, name: str = "in.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.fixture
def step_router(tmp_path: Path) -> Path:
    """A trained router for steps, of random weights."""
    from r2r_glimp.hub.checkpoint import RouterCheckpoint
    from r2r_glimp.hub.config import RouterConfig
    from r2r_glimp.routing.features import FeatureSpec
    from r2r_glimp.routing.mlp import MLPConfig, MLPRouterNet, MLPSize, Threshold

    features = FeatureSpec(hidden_size=32, top_k_logits=4)
    shape = MLPConfig(granularity="step", features=features, size=MLPSize(width=4, blocks=1))
    thresholds = {"default": Threshold(value=0.5, calibrated_on="nothing")}
    config = RouterConfig(model=shape, thresholds=thresholds, default_threshold="default")
    RouterCheckpoint(config, MLPRouterNet(shape).state_dict()).save_pretrained(tmp_path / "router")
    return tmp_path / "router"
