"""Tasks and routing by preset, on local files of each dataset's schema; what cannot be graded."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from labeling.sections import SourceConfig
from r2r_glimp.cli import evaluate, generate, serve
from r2r_glimp.cli.evaluation.options import read_comparison
from r2r_glimp.cli.options import read_params
from r2r_glimp.cli.parser import pick
from r2r_glimp.core import DataError, RoutingParams, SamplingParams, UsageError
from r2r_glimp.evaluation.task import GradingOptions, Task, load_task

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TESTS = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {  # a row, a right answer, a wrong one
    "aime24": (
        {"ID": "2024-I-1", "Problem": "Find x.", "Solution": "...", "Answer": 33},
        r"\boxed{1}</think> \boxed{\text{33}}",
        r"\boxed{33}</think> \boxed{34}",
    ),
    "aime25": (
        {"id": "0", "problem": "Find x.", "answer": "070"},
        r"</think> \boxed{70}",
        r"</think> \boxed{7}",
    ),
    "math500": (
        {
            "unique_id": "test/algebra/1.json", "problem": "Half?", "solution": "...",
            "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 1,
        },
        r"</think> \boxed{0.5}",
        r"</think> \boxed{0.4}",
    ),
    "gpqa-diamond": (
        {
            "Record ID": "rec1", "Question": "Which one?", "Correct Answer": "right",
            "Incorrect Answer 1": "a", "Incorrect Answer 2": "b", "Incorrect Answer 3": "c",
        },
        "</think> Answer: {gold}",
        "</think> Answer: E",
    ),
    "livecodebench": (
        {
            "question_id": "abc1_a", "question_content": "Add 1.", "starter_code": "",
            "public_test_cases": json.dumps(TESTS), "private_test_cases": json.dumps(TESTS),
            "metadata": "{}",
        },
        "</think>\n```python\nprint(int(input()) + 1)\n```",
        "</think>\n```python\nprint(1)\n```",
    ),
}  # fmt: skip


def load(name: str, path: Path, *argv: str) -> Task:
    """A preset's task, read from a local file instead."""
    options = evaluate.build_parser().parse(
        ["--config", str(CONFIGS / "evaluation" / f"{name}.yaml"), "--task.kind", "file",
         "--task.path", str(path), "--grader_workers", "1", *argv]
    )  # fmt: skip
    source = SourceConfig(**options.task.as_dict())
    return load_task(source, grading=pick(GradingOptions, options))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_benchmark_is_read_and_graded(name: str, suffix: str, tmp_path: Path) -> None:
    row, right, wrong = ROWS[name]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        parquet.write_table(pa.Table.from_pylist([row]), path)
    task = load(name, path, *(["--allow_code_execution"] if name == "livecodebench" else []))
    try:
        (question,) = task.questions
        assert task.name == name and question.where == f"{path}:1"
        grades = [
            task.grade(question, text.replace("{gold}", str(question.answer))).grade
            for text in (right, wrong, "</think> Well.")
        ]
        assert grades == ["right", "wrong", "unanswered"]
    finally:
        task.grader.close()


def test_choices_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(ROWS["gpqa-diamond"][0] | {"Record ID": i}) + "\n" for i in range(20))
    )
    golds = [
        [q.answer for q in load("gpqa-diamond", path, "--task.seed", seed).questions]
        for seed in ("0", "0", "1")
    ]
    assert golds[0] == golds[1] != golds[2] and len(set(golds[0])) == 4


def test_programs_are_not_run_unasked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["livecodebench"][0]) + "\n")
    with pytest.raises(UsageError, match="--allow_code_execution"):
        load("livecodebench", path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime25", {"id": "0", "problem": "?"}, ":1: key 'answer' is missing"),
        ("aime24", {"ID": "1", "Problem": "?", "Answer": None}, ":1: key 'Answer' is NoneType"),
        ("livecodebench", {"question_id": "1", "question_content": "?"}, ":1: no tests"),
        ("math500", None, "the file is empty"),
    ],
)
def test_what_cannot_be_graded_is_named(
    name: str, row: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("" if row is None else json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        load(name, path, "--allow_code_execution")


@pytest.mark.parametrize("verb", [generate, serve])
@pytest.mark.parametrize("name", ["r2r", "glimprouter"])
def test_a_routing_preset_holds_for_every_verb(verb: Any, name: str) -> None:
    argv = ["--config", str(CONFIGS / "routing" / f"{name}.yaml")]
    sampling, routing = read_params(verb.build_parser().parse(argv))
    options = evaluate.build_parser().parse(argv)
    assert pick(SamplingParams, options) == sampling
    assert pick(RoutingParams, options) == pick(RoutingParams, verb.build_parser().parse(argv))
    wanted = read_comparison(options, routing)
    if name == "glimprouter":
        assert (routing.granularity, routing.threshold, routing.answer_by) == ("step", 1.0, "llm")
        assert (routing.max_step_tokens, routing.max_thinking_tokens) == (512, 8192)
        assert (sampling.temperature, sampling.top_p) == (0.6, 0.95)
        assert wanted.routers == ["slm", "llm", "entropy"] and wanted.threshold == 1.0
        assert wanted.granularities == ["step"]
    else:
        assert (routing.granularity, routing.answer_by) == ("token", "router")
        assert (sampling.temperature, sampling.max_tokens) == (0.0, 32768)
        assert wanted.granularities == ["token"]


def test_a_preset_s_router_is_one_more_system() -> None:
    preset = ["--config", str(CONFIGS / "routing" / "glimprouter.yaml")]
    options = evaluate.build_parser().parse(
        [*preset, "--routers", "slm", "--routers", "mine", "--granularities", "token"]
    )
    wanted = read_comparison(options, pick(RoutingParams, options))
    assert wanted.routers == ["slm", "mine", "entropy"]
    assert wanted.granularities == ["token"]  # what is said last wins
