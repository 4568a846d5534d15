"""Sampling: the right distribution, honoured filters, and randomness that depends on nothing but
the request."""

from collections import Counter

import pytest
import torch

from r2r_glimp.core import SamplingParams, UsageError
from r2r_glimp.engine.sampling import Stream, sample, token_logprob, uniform

LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def draw(params: SamplingParams, n: int = 4000) -> Counter[int]:
    uniforms = [uniform(seed, 0, Stream.SLM) for seed in range(n)]
    return Counter(sample(LOGITS.expand(n, -1), [params] * n, uniforms))


def test_zero_temperature_is_the_argmax() -> None:
    assert draw(SamplingParams(temperature=0.0)) == {0: 4000}


def test_frequencies_follow_the_distribution() -> None:
    counts = draw(SamplingParams(temperature=1.0), n=20000)
    for token, p in enumerate([0.5, 0.25, 0.15, 0.1]):
        assert abs(counts[token] / 20000 - p) < 0.015


def test_temperature_sharpens() -> None:
    counts = draw(SamplingParams(temperature=0.5), n=20000)
    squared = torch.tensor([0.5, 0.25, 0.15, 0.1]) ** 2
    assert abs(counts[0] / 20000 - (squared / squared.sum())[0]) < 0.015


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=1.0, top_k=1), {0}),
        (SamplingParams(temperature=1.0, top_k=2), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.5), {0}),
        (SamplingParams(temperature=1.0, top_p=0.51), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.01), {0}),
        (SamplingParams(temperature=1.0, min_p=0.4), {0, 1}),
        (SamplingParams(temperature=1.0, min_p=1.0), {0}),
        # top-p looks at what top-k left, renormalised: 2/3 of two tokens is the first alone.
        (SamplingParams(temperature=1.0, top_k=2, top_p=0.66), {0}),
    ],
)
def test_filters(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draw(params)) == allowed


def test_rows_with_different_parameters_share_a_batch() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=1),
    ]
    assert sample(LOGITS.expand(3, -1), params, [0.99, 0.99, 0.99]) == [0, 3, 0]


def test_uniforms_are_uniform_and_independent_between_streams_and_positions() -> None:
    values = [uniform(7, position, stream) for position in range(3000) for stream in Stream]
    assert len(set(values)) == len(values)
    assert abs(sum(values) / len(values) - 0.5) < 0.01
    pairs = [
        (uniform(s, 0, Stream.SLM) < 0.5, uniform(s, 0, Stream.LLM) < 0.5) for s in range(4000)
    ]
    assert all(abs(count / 4000 - 0.25) < 0.03 for count in Counter(pairs).values())


def test_token_logprob() -> None:
    result = token_logprob(LOGITS[0], token=2, num_top=2)
    assert result.logprob == pytest.approx(torch.tensor(0.15).log().item(), abs=1e-6)
    assert [token for token, _ in result.top] == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", 99),
        ("top_p", 0), ("top_p", 1.1),
        ("top_k", -1), ("top_k", 1.5), ("min_p", 2), ("seed", -1), ("seed", 2**70),
        ("max_tokens", 0), ("n", 0),
        ("n", 10**9), ("logprobs", 10**6), ("stop", ("",)), ("max_tokens", True),
    ],
)  # fmt: skip
def test_out_of_range_values_are_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})
