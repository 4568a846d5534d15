"""`r2r-glimp evaluate`: on the bundled pair, resumed, refused; its statistics on known cases."""

import dataclasses
import json

import numpy as np
import pytest

from labeling.formats import Question
from r2r_glimp.core import UsageError
from r2r_glimp.evaluation.cost import Parameters
from r2r_glimp.evaluation.statistics import interval, resample_weights, sign_flip_test
from r2r_glimp.evaluation.store import Sample, Store
from r2r_glimp.evaluation.summary import Result, summarise, to_markdown
from r2r_glimp.evaluation.system import System
from r2r_glimp.evaluation.task import Task

ROUTERS = [f"--routers={name}" for name in ("slm", "llm", "random", "entropy", "oracle")]


@pytest.fixture
def evaluate(cli, tmp_path):
    def run(*argv: str):
        more = ("--answer_by", "router", "--max_tokens", "120", "--kv_memory", "64MiB")
        return cli("evaluate", "--out", str(tmp_path / "out"), *more, *argv)

    return run


def test_the_bundled_pair(evaluate, tmp_path):
    # In bfloat16 near ties of wording depend on the batch.
    argv = (
        *ROUTERS,
        "--dtype",
        "float32",
        "--limit",
        "40",
        "--shares",
        "0.2",
        "--calibration_prompts",
        "30",
        "--json",
    )
    result = evaluate(*argv)
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    rows = {(r["router"], r["granularity"]): r for r in summary["rows"]}
    assert len(rows) == 8 and summary["questions"] == 40
    slm, llm = rows["slm", None], rows["llm", None]
    assert slm["llm_share"] == 0 and llm["llm_share"] == 1
    assert slm["average_parameters"] < llm["average_parameters"]
    for granularity in ("token", "step"):
        oracle = rows["oracle", granularity]
        # With labels in the loop nothing is lost to the LLM, for few of its tokens.
        assert oracle["accuracy"] >= llm["accuracy"] > slm["accuracy"]
        assert 0 < oracle["llm_share"] < 0.3 and oracle["oracle_ratio"] == pytest.approx(1)
        assert rows["entropy", granularity]["llm_share"] == pytest.approx(0.2, abs=0.08)
        assert rows["random", granularity]["threshold"] == 0.2
    assert rows["oracle", "token"]["llm_share"] < rows["oracle", "step"]["llm_share"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        "parameters-step.png", "parameters-token.png", "share-step.png", "share-token.png"
    ]  # fmt: skip

    # Killed in the middle of a line, it goes on and comes to the same.
    (path,) = (tmp_path / "out" / "samples").glob("entropy-step*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = json.loads(evaluate(*argv).out)
    # What was computed depends on who shares a prefix in the batch; what was written does not.
    for row in (*summary["rows"], *again["rows"]):
        for name in ("seconds", "slm_computed", "llm_computed"):
            row.pop(name)
    assert again == summary
    texts = [{s["id"]: s["text"] for s in map(json.loads, data.splitlines())}
             for data in (whole, path.read_bytes())]  # fmt: skip
    assert texts[0] == texts[1] and len(texts[0]) == 40

    # What would change the texts is refused.
    assert "with other routing" in evaluate(*argv, "--max_step_tokens", "3").error
    assert "with other task" in evaluate(*argv, "--task.levels", "[1]").error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shares", "2"], "--shares 2 is out of range"),
        (["--granularities", "word"], "choose token or step"),
        (["--repeats", "2"], "--repeats needs --temperature"),
        (["--limit", "0"], "--limit 0 is out of range"),
        (["--routers", "nope"], "unknown router 'nope'"),
        (["--shares", "0.1", "--calibration.split", "test"], "that are evaluated"),
        (
            ["--task.kind", "file", "--task.path", "gone.jsonl", "--task.answer", "number"],
            "no such",
        ),
        (["--task.kind", "file", "--task.path", "gone.jsonl"], "give --task.answer"),
        (
            ["--task.kind", "file", "--task.path", "x.jsonl", "--shares", "0.1"],
            "give --calibration.kind",
        ),
    ],
)
def test_bad_input(evaluate, argv, message):
    result = evaluate(*argv)
    assert result.code == 2 and message in result.error


def test_a_question_without_its_answer(evaluate, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "a", "question": "1 + 1?"}\n')
    argv = ("--task.kind", "file", "--task.path", str(path), "--task.answer", "number")
    assert "no known answer" in evaluate(*argv).error


def test_a_folder_in_use(evaluate, tmp_path):
    with Store(tmp_path / "out").lock():
        assert "in use by another evaluation" in evaluate("--limit", "1").error
    (tmp_path / "out" / "thesis.tex").touch()
    assert "holds other files (thesis.tex)" in evaluate("--limit", "1").error


def test_numbers_are_equal_in_value():
    task = Task("t", [], lambda text: text or None)
    question = Question(id="a", prompt="?", source="t", where="x:1", answer="7.50")
    assert [task.grade(question, text) for text in ("7.5", "7.50", "7.4", "")] == [
        "right", "right", "wrong", "unanswered"
    ]  # fmt: skip


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
