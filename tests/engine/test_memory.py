"""From kv_memory to blocks: sizes, shares of what is free, two devices, and what does not fit."""

import pytest
import torch

from r2r_glimp.core import UsageError
from r2r_glimp.engine import memory
from r2r_glimp.engine.memory import plan_blocks

CPU, FIRST, SECOND = (torch.device(d) for d in ("cpu", "cuda:0", "cuda:1"))
FREE = {CPU: 100 * 16 * 10, FIRST: 2 * 2**30, SECOND: 10 * 2**30}


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", FREE.__getitem__)


@pytest.mark.parametrize(
    ("kv_memory", "bytes_per_token", "num_blocks"),
    [
        ("1GiB", {CPU: 2**16}, 1024),
        (2**30, {CPU: 2**16}, 1024),
        ("512MiB", {FIRST: 2**14, SECOND: 2**14}, 1024),
        ("auto", {CPU: 2**16}, 1024),
        (0.5, {CPU: 10}, 50),
        ("0.5", {CPU: 10}, 50),
        ("0.5", {FIRST: 2**16}, 1024),
        ("auto", {FIRST: 2**16}, int(0.85 * 2048)),
        # the smaller device decides: both models hold the same tokens
        ("0.5", {FIRST: 2**14, SECOND: 2**18}, 1280),
        ("0.5", {FIRST: 2**16, SECOND: 2**16}, 1024),
        ("auto", {CPU: 2**16, FIRST: 2**16}, int(0.85 * 2048)),
    ],
)
def test_blocks(
    kv_memory: str | float, bytes_per_token: dict[torch.device, int], num_blocks: int
) -> None:
    assert plan_blocks(kv_memory, bytes_per_token)[0] == num_blocks


def test_a_share_is_said_in_bytes() -> None:
    words = plan_blocks("0.5", {FIRST: 2**14, SECOND: 2**18})[1]
    assert words == "0.5 of the free memory (1.0 GiB on cuda:0, 5.0 GiB on cuda:1)"


def test_what_does_not_fit_says_what_does() -> None:
    with pytest.raises(UsageError) as refused:
        plan_blocks("8GiB", {FIRST: 2**16, SECOND: 2**16})
    assert str(refused.value) == (
        "kv_memory=8GiB does not fit: 4.0 GiB of it belong on cuda:0, where 2.0 GiB are free, "
        "32,768 tokens; use --kv_memory 0.85, which is a share of what is free"
    )


@pytest.mark.parametrize("kv_memory", ["1KiB", "0.001", 0])
def test_too_small(kv_memory: str | float) -> None:
    with pytest.raises(UsageError, match="too small: one block of 16 tokens"):
        plan_blocks(kv_memory, {CPU: 2**16})


@pytest.mark.parametrize("kv_memory", ["much", "-1", "nan", "85%", "", "1.5.2GiB"])
def test_not_a_size(kv_memory: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        plan_blocks(kv_memory, {CPU: 2**16})


def test_free_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 2**20 < memory.free_bytes(CPU) < 2**45
