"""A server nobody here wrote: `transformers serve`, in its own environment.

python3 -m venv /tmp/peer && /tmp/peer/bin/pip install torch "transformers[serving]"
R2R_GLIMP_PEER=/tmp/peer/bin/transformers python -m pytest -m peer
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r2r_glimp.core import Prompt, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair
from r2r_glimp.models.remote import RemoteModel

PEER = os.environ.get("R2R_GLIMP_PEER")
LLM = str(Path(__file__).parents[2] / "checkpoints" / "abacus-llm")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PEER is None, reason="R2R_GLIMP_PEER names no `transformers` command"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the bundled LLM."""
    assert PEER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("peer") / "log"
    command = [PEER, "serve", LLM, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    # Its own environment: none of our modules, no network.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("router", ["random", "llm"])
def test_by_text_a_step_at_a_time(
    router: str,
    url: str,
    connect: Callable[..., ModelPair],
    local: ModelPair,
    prompts: list[Prompt],
) -> None:
    pair = connect({"url": url, "model": LLM, "context_length": 1024})
    assert isinstance(pair.llm, RemoteModel) and pair.llm.dialect.name == "text"
    routing = RoutingParams(
        granularity="step", router=router, threshold=0.6 if router == "random" else None
    )
    sampling = SamplingParams(max_tokens=160, seed=3)
    outputs = Engine(pair, kv_memory="32MiB").generate(prompts, sampling, routing)
    wanted = Engine(local, kv_memory="32MiB").generate(prompts, sampling, routing)
    assert [o.text for o in outputs] == [o.text for o in wanted]
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in wanted]
    assert sum(o.stats.llm_tokens for o in outputs) > 20
