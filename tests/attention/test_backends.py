"""Which backend is chosen, and what is said where a faster one should be had and is not."""

import builtins
import logging

import pytest
import torch

from r2r_glimp.attention import backends
from r2r_glimp.attention.backends import choose_backend
from r2r_glimp.core import UsageError
from r2r_glimp.models.placement import check_dtype

GPU = torch.device("cuda:0")


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "Triton paged attention, torch varlen for prompts"),
        (torch.float32, "Triton paged attention"),
    ],
)
def test_a_gpu_gets_triton(
    dtype: torch.dtype,
    name: str,
    capability: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from r2r_glimp.attention import triton

    monkeypatch.setattr(triton, "why_not", lambda device: None)
    assert choose_backend("it", GPU, dtype, "auto").name == name
    assert choose_backend("it", GPU, dtype, "torch").name == "gathered attention"
    monkeypatch.setattr(triton, "why_not", lambda device: "Failed to find C compiler.")
    with caplog.at_level(logging.WARNING):
        assert choose_backend("it", GPU, dtype, "auto").name == "gathered attention"
    assert "Triton does not run on cuda:0 (Failed to find C compiler.)" in caplog.text


def test_a_missing_triton_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert choose_backend("it", GPU, torch.bfloat16, "auto").name == "gathered attention"
    assert "Triton is not installed: attention gathers pages" in caplog.text
    caplog.clear()
    assert choose_backend("it", GPU, torch.bfloat16, "torch").name == "gathered attention"
    assert not caplog.records, "who asks for the reference is not warned"


@pytest.mark.parametrize("capability", [(7, 5)], indirect=True)
def test_a_gpu_too_old_for_triton_is_said(
    capability: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: "there")
    with caplog.at_level(logging.WARNING):
        assert choose_backend("it", GPU, torch.float16, "auto").name == "gathered attention"
    assert "cuda:0 has compute capability 7.5" in caplog.text


@pytest.mark.parametrize("capability", [(7, 5)], indirect=True)
def test_bfloat16_on_a_gpu_without_it_is_refused(capability: None) -> None:
    with pytest.raises(UsageError) as refused:
        check_dtype(GPU, torch.bfloat16)
    assert str(refused.value) == (
        "bfloat16 is not to be had on cuda:0 (Tesla T4, compute capability 7.5, it takes 8.0): "
        "use --dtype float16 or float32"
    )
    check_dtype(GPU, torch.float16)
    check_dtype(torch.device("cpu"), torch.bfloat16)


def test_the_cpu_never_looks_at_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        assert not name.startswith("r2r_glimp.attention.triton")
        return load(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "attention" in choose_backend("it", torch.device("cpu"), torch.float32, "auto").name
