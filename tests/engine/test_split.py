"""An LLM split over two processes writes what it writes in one."""

import json
import os
import subprocess
import sys
from array import array

import pytest

from r2r_glimp.attention.gather import Row
from r2r_glimp.core import UsageError
from r2r_glimp.engine.split import _decode, _encode
from r2r_glimp.models import ModelPair

GENERATE = [
    *("-m", "r2r_glimp", "generate", "Tom has 3 hats. How many hats does Tom have?", "--json"),
    *("--pair", "abacus", "--dtype", "float32", "--kernels", "torch", "--router", "random"),
    *("--threshold", "0.4", "--seed", "1", "--max_tokens", "30"),
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )


def test_two_processes_write_what_one_writes() -> None:
    one = run(*GENERATE, "--device", "cpu")
    two = run(*TORCHRUN, *GENERATE, "--device", "cpu,tp")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    expected, got = (json.loads(done.stdout) for done in (one, two))  # one line: process 0's
    assert got["token_ids"] == expected["token_ids"]
    assert got["sources"] == expected["sources"]
    assert {"slm", "llm"} == {*got["sources"]}


def test_a_message_says_what_a_pass_computes() -> None:
    rows = [Row([5, 6, 7], 0, array("i", [9])), Row([8], 33, array("i", [2, 3, 4]))]
    assert _decode(_encode(rows, [0, 1])) == (rows, [0, 1])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"slm": "cpu", "llm": "tp"}, "start them by torchrun --nproc_per_node N"),
        ({"slm": "tp", "llm": "cpu"}, "is for an LLM that is computed here"),
        ("tp", "is for an LLM that is computed here"),
    ],
)
def test_what_cannot_be_split_is_refused(device: str | dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelPair.from_config("abacus", device=device)
