"""`r2r-glimp evaluate`: on the bundled pair, resumed, refused."""

import json

import pytest

from r2r_glimp.core import DataError
from r2r_glimp.evaluation.grading.grader import ExactGrader
from r2r_glimp.evaluation.store import Store

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


def test_nothing_to_ask(evaluate, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n")
    argv = ("--task.kind", "file", "--task.path", str(path), "--task.answer", "number")
    assert "there is nothing to ask" in evaluate(*argv).error


def test_a_failed_answer_is_an_exit_code_and_tried_again(evaluate, tmp_path, monkeypatch):
    def stumble(self, question, text):
        raise DataError("it broke")

    argv = ("--routers", "slm", "--limit", "2", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(ExactGrader, "grade", stumble)
        result = evaluate(*argv)
        assert result.code == 1
        assert "2 of 2 answers failed (not graded: it broke)" in result.err
        assert evaluate(*argv, "--allow_errors").code == 0
    result = evaluate(*argv)
    assert result.code == 0 and "answers failed" not in result.err + result.out


def test_random_follows_a_given_threshold(evaluate, tmp_path):
    argv = ("--router", "entropy", "--granularity", "step", "--threshold", "0.001")
    result = evaluate(*argv, "--routers=slm", "--routers=llm", "--routers=random",
                      "--limit", "40", "--answer_by", "llm", "--json")  # fmt: skip
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    rows = {row["router"]: row for row in summary["rows"]}
    assert list(rows) == ["slm", "llm", "entropy", "random"]
    assert rows["slm"]["llm_share"] == 0  # a baseline is alone, whoever answers
    assert rows["random"]["llm_share"] == pytest.approx(rows["entropy"]["llm_share"], abs=0.1)
    assert [c["against"] for c in summary["comparisons"]] == ["slm", "llm", "random"]
    for row in summary["rows"]:
        assert row["seconds"] > 0 and row["average_parameters"] > 0
    assert rows["llm"]["llm_prefill"] > 10 and rows["llm"]["slm_prefill"] == 0
    assert summary["about"]["slm"].endswith("abacus-slm")

    # Everything is there already; nothing is asked, and the times stay.
    again = json.loads(evaluate(*argv, "--routers=slm", "--routers=llm", "--routers=random",
                                "--limit", "40", "--answer_by", "llm", "--json").out)  # fmt: skip
    assert again["rows"] == summary["rows"]


def test_what_contradicts_itself(evaluate):
    assert "--thresholds" in evaluate("--threshold", "0.5").error
    assert "--entropy_top_k" in evaluate("--entropy_top_k", "20", "--routers", "slm").error
    assert "out of range" in evaluate("--grader_timeout", "0").error


def test_random_alone_has_a_threshold_of_its_own(evaluate):
    for argv, wanted in ((("--routers=random", "--thresholds=0.3"), 0.3),
                         (("--router=random", "--threshold=0.4"), 0.4)):  # fmt: skip
        result = evaluate(*argv, "--granularities=step", "--limit=3", "--json", "--overwrite")
        assert result.code == 0, result.err
        rows = json.loads(result.out)["rows"]
        assert [r["threshold"] for r in rows if r["router"] == "random"] == [wanted]


def test_no_router_is_left(evaluate):
    argv = ("--routers", "checkpoints/abacus-step-router", "--granularities", "token")
    result = evaluate(*argv, "--limit=3")
    assert result.code == 2 and "no system is left" in result.err
