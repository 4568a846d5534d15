"""The tables of an evaluation: statistics and comparisons on known cases, files that are kept."""

import dataclasses

import numpy as np
import pytest

from r2r_glimp.core import UsageError
from r2r_glimp.evaluation.cost import Parameters
from r2r_glimp.evaluation.markdown import to_markdown
from r2r_glimp.evaluation.result import Result
from r2r_glimp.evaluation.statistics import interval, resample_weights, sign_flip_test
from r2r_glimp.evaluation.store import Sample, Store
from r2r_glimp.evaluation.summary import summarise
from r2r_glimp.evaluation.system import System


def _result(router, right, *, granularity=None, share=None, llm_tokens=0) -> Result:
    samples = [
        Sample(
            id=str(i), repeat=0, grade="right" if ok else "wrong", answer="1", gold="1",
            finish_reason="stop", slm_tokens=10 - llm_tokens, llm_tokens=llm_tokens, switches=0,
            decisions=0, deferrals=0, slm_computed=0, llm_computed=0, text="",
        )
        for i, ok in enumerate(right)
    ]  # fmt: skip
    system = System(router=router, granularity=granularity, target_share=share)
    return Result(system, samples, Parameters(1.0, 0.0, 10.0))


def test_the_table_on_a_known_case():
    half, all_ = [i % 2 == 0 for i in range(100)], [True] * 100
    most = [i % 2 == 0 or i < 50 for i in range(100)]
    summary = summarise(
        "known",
        1,
        [
            _result("slm", half),
            _result("llm", all_, llm_tokens=10),
            _result("entropy", half, granularity="token", share=0.2, llm_tokens=2),
            _result("mine", most, granularity="token", share=0.2, llm_tokens=2),
            _result("oracle", all_, granularity="token", llm_tokens=1),
        ],
    )
    rows = {row.router: row for row in summary.rows}
    assert rows["mine"].gap == pytest.approx(0.5) and rows["mine"].llm_share == pytest.approx(0.2)
    assert rows["mine"].gap_low < 0.5 < rows["mine"].gap_high
    # The oracle reaches half the gap with half of its tokens: 5% against 20%.
    assert rows["mine"].oracle_ratio == pytest.approx(4.0)
    assert rows["llm"].average_parameters == 10 and rows["mine"].average_parameters == 3
    (comparison,) = summary.comparisons
    assert comparison.difference == pytest.approx(0.25) and comparison.p < 0.001
    assert (comparison.router, comparison.against) == ("mine", "entropy")
    assert "| 20% | token | mine | entropy | +25.0 points" in to_markdown(summary)


def test_intervals_cover_and_tests_do_not_cry_wolf():
    rng = np.random.default_rng(1)
    weights = resample_weights(300)
    covered = rejected = 0
    for seed in range(200):
        right = (rng.random(300) < 0.7).astype(float)
        low, high = interval(weights @ right)
        covered += low <= 0.7 <= high
        differences = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=300)
        rejected += seed < 60 and sign_flip_test(differences, seed) < 0.05
    assert 180 <= covered <= 199
    assert rejected <= 9
    assert sign_flip_test(np.zeros(5)) == 1.0
    assert sign_flip_test(np.ones(40)) < 0.001


def test_systems_have_files_of_their_own():
    one = System(router="runs/a/router", granularity="token", threshold=0.1)
    others = (
        dataclasses.replace(one, router="runs/b/router"),
        dataclasses.replace(one, threshold=0.2),
        dataclasses.replace(one, granularity="step"),
    )
    assert len({one.slug, *(other.slug for other in others)}) == 4
    assert one.name == "router" and "/" not in one.slug


def test_a_broken_sample_is_named(tmp_path):
    store = Store(tmp_path)
    store.start({"a": 1}, overwrite=False)
    (tmp_path / "samples" / "x.jsonl").write_text("{}\n")
    with pytest.raises(Exception, match="x.jsonl:1: not a sample"):
        store.samples("x")
    with pytest.raises(UsageError, match="with other a"):
        store.start({"a": 2}, overwrite=False)
    store.start({"a": 2}, overwrite=True)
    assert store.samples("x") == {}
