"""The LLM waits for company where that pays, by what passes take, and never longer than a pass."""

from types import SimpleNamespace
from typing import Any

import pytest

from r2r_glimp.core import Model
from r2r_glimp.engine.cost import PassCost
from r2r_glimp.engine.patience import Patience


def sequences(num: int, *, waited: int = 0, constant: Model | None = None) -> list[Any]:
    route = SimpleNamespace(router=SimpleNamespace(constant=constant))
    policy = SimpleNamespace(route=route)
    return [SimpleNamespace(policy=policy, ticks_waiting=waited) for _ in range(num)]


def patience(slm_s: float, llm_s: float, share: float) -> Patience:
    """After 100 ticks of ten rows, `share` of which the LLM was called for."""
    costs = PassCost(), PassCost()
    costs[Model.SLM].observe(10, slm_s)
    costs[Model.LLM].observe(10, llm_s)
    made = Patience(costs, None, 0)
    for _ in range(100):
        made.count(Model.SLM, sequences(10))
        made.count(Model.LLM, sequences(round(10 * share)))
    return made


def test_the_fixed_part_of_a_pass_is_found() -> None:
    cost = PassCost()
    assert cost.fixed_s == 0
    for num_tokens in (1, 8, 3, 2048, 16, 1, 5):
        cost.observe(num_tokens, 0.1 + 0.004 * num_tokens)
    assert cost.fixed_s == pytest.approx(0.1)
    same = PassCost()
    for _ in range(3):
        same.observe(4, 0.2)
    assert same.fixed_s == pytest.approx(0.2)


def test_a_changed_machine_is_learnt() -> None:
    cost = PassCost()
    for i in range(100):
        cost.observe(1 + i % 8, 1 + 0.1 * (i % 8))
    for i in range(400):
        cost.observe(1 + i % 8, 0.01 + 0.001 * (1 + i % 8))
    assert cost.fixed_s == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("slm_s", "llm_s", "share", "num_waiting", "waits"),
    [
        (0.005, 0.100, 0.1, 4, True),  # a tick brings 1.0 rows to share 0.1 s, and costs 0.02 s
        (0.005, 0.100, 0.1, 30, False),  # so many stand still meanwhile
        (0.005, 0.100, 0.0, 1, False),  # nobody will come
        (0.050, 0.100, 0.1, 4, False),  # the SLM is too slow for that
    ],
)
def test_it_waits_while_it_pays(
    slm_s: float, llm_s: float, share: float, num_waiting: int, waits: bool
) -> None:
    assert patience(slm_s, llm_s, share).waits(sequences(num_waiting), 10) is waits


def test_nobody_waits_longer_than_a_pass_takes() -> None:
    made = patience(0.005, 0.100, 0.1)
    assert made.waits(sequences(1), 10)
    made.costs[Model.SLM].observe(2048, 0.2)  # a long prompt came between
    assert not made.waits(sequences(1, waited=1), 10)


def test_it_never_waits_for_nothing() -> None:
    assert not patience(0.005, 0.100, 0.1).waits(sequences(1), 0)
    assert not Patience((PassCost(), PassCost()), None, 0).waits(sequences(1), 9)


def test_requests_of_the_llm_alone_promise_no_company() -> None:
    made = Patience(patience(0.005, 0.1, 0.1).costs, None, 0)
    for _ in range(100):
        made.count(Model.SLM, sequences(10))
        made.count(Model.LLM, sequences(10, constant=Model.LLM))
    assert not made.waits(sequences(1), 10)


def test_numbers_given_are_kept() -> None:
    made = Patience((PassCost(), PassCost()), 3, 5)
    assert made.waits(sequences(2), 9)
    assert not made.waits(sequences(3), 9)
    assert not made.waits(sequences(2, waited=5), 9)
