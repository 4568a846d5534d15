"""Training-free routers: what they score, and that a row's score depends on that row alone."""

import math

import pytest
import torch

from r2r_glimp.core import Decision, UsageError
from r2r_glimp.routing.routers import (
    NAMED_ROUTERS,
    EntropyRouter,
    MarginRouter,
    RandomRouter,
    ReplayRouter,
    named_router,
)
from r2r_glimp.routing.signals import Signals, entropy_nats


def signals(logits: torch.Tensor, uniforms: list[float] | None = None) -> Signals:
    n = logits.shape[0]
    return Signals(
        torch.zeros(n, 4), logits, logits.argmax(-1), list(range(n)), uniforms or [0.0] * n
    )


def test_entropy_is_in_nats_over_the_full_vocabulary() -> None:
    logits = torch.stack([torch.zeros(100), torch.tensor([50.0] + [0.0] * 99)])
    scores = EntropyRouter().score(signals(logits))
    assert scores[0].item() == pytest.approx(math.log(100), abs=1e-5)
    assert scores[1].item() == pytest.approx(0.0, abs=1e-5)


def test_entropy_top_k_is_the_papers_code() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    top = logits.log_softmax(-1).topk(20).values.exp()
    renormalised = top / top.sum(-1, keepdim=True)
    expected = -(renormalised * renormalised.log()).sum(-1)
    assert torch.allclose(EntropyRouter(top_k=20).score(signals(logits)), expected, atol=1e-5)
    assert EntropyRouter(top_k=20).score(signals(torch.zeros(1, 100))).item() == pytest.approx(
        math.log(20)
    )


def test_masked_tokens_add_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert entropy_nats(logits).item() == pytest.approx(math.log(2))


def test_margin() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3]]))
    assert torch.allclose(
        MarginRouter().score(signals(logits)), torch.tensor([0.7, 1.0]), atol=1e-5
    )


def test_random_defers_with_the_threshold_as_probability() -> None:
    router = RandomRouter()
    scores = router.score(signals(torch.zeros(4, 3), [0.0, 0.19, 0.2, 0.9])).tolist()
    assert [router.defers(score, 0.2) for score in scores] == [True, True, False, False]


def test_replay_takes_positions_or_a_trace() -> None:
    trace = [
        Decision(0, "llm", 5, deferred=True),
        Decision(1, "slm", 5),
        Decision(3, "llm", 5, deferred=True),
    ]
    for router in (ReplayRouter([0, 3]), ReplayRouter(trace)):
        assert router.score(signals(torch.zeros(4, 3))).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_row_is_scored_alike_in_any_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    for router in (EntropyRouter(), EntropyRouter(top_k=5), MarginRouter()):
        together = router.score(signals(logits))
        for i in range(6):
            assert router.score(signals(logits).rows([i])).item() == pytest.approx(
                together[i].item(), abs=1e-6
            )


def test_names() -> None:
    for name in NAMED_ROUTERS:
        assert named_router(name).name == name
    with pytest.raises(UsageError, match="choose one of entropy, margin, random, slm, llm"):
        named_router("best")
    with pytest.raises(UsageError, match="entropy_top_k"):
        EntropyRouter(top_k=1)
