"""Questions from files of each dataset's schema, and inputs that are wrong."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from labeling.__main__ import parse
from labeling.sections import SourceConfig
from labeling.sources import find_extract, load_questions
from r2r_glimp.core import DataError, UsageError

ROOT = Path(__file__).parents[2]
ROWS: dict[str, dict[str, Any]] = {
    "aime": {
        "ID": "1983-1",
        "Year": 1983,
        "Problem Number": 1,
        "Question": "Find x.",
        "Answer": "060",
        "Part": None,
    },
    "gpqa": {
        "Record ID": "rec1",
        "Question": "Which one?",
        "Correct Answer": "right",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
    },
    "bespoke-stratos": {
        "system": "Your role ...",
        "conversations": [
            {"from": "user", "value": "Return your final response within \\boxed{}."},
            {"from": "assistant", "value": "<|begin_of_thought|> ..."},
        ],
    },
    "livecodebench": {
        "question_id": "abc301_a",
        "question_title": "Overall Winner",
        "question_content": "Who won?",
        "starter_code": "",
        "difficulty": "easy",
        "private_test_cases": "eJx...",
    },
}


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_preset_reads_a_local_file_of_its_schema(name: str, tmp_path: Path) -> None:
    jsonl, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    write(jsonl, ROWS[name])
    parquet.write_table(pa.Table.from_pylist([ROWS[name]]), table)
    preset = str(ROOT / "configs" / "labeling" / f"{name}.yaml")
    for path in (jsonl, table):
        argv = ["--config", preset, "--source.kind", "file", "--source.path", str(path)]
        source = parse(argv).source
        [question] = load_questions(source, limit=1)
        assert question.source == name
        assert question.where == f"{path}:1"
        known = {"aime": "060", "gpqa": None, "bespoke-stratos": None, "livecodebench": None}
        if name == "gpqa":
            assert question.answer in ("A", "B", "C", "D")
            assert f"{question.answer}) right" in question.prompt
            assert question.prompt.endswith("Answer: LETTER.")
        else:
            assert question.answer == known[name]
        assert (find_extract(source) is not None) == (name in ("aime", "gpqa"))


def test_starter_code_is_part_of_the_question(tmp_path: Path) -> None:
    row = ROWS["livecodebench"] | {"starter_code": "class Solution:"}
    path = write(tmp_path / "x.jsonl", row)
    [question] = load_questions(SourceConfig(kind="file", path=path, format="livecodebench"))
    assert "class Solution:" in question.prompt and "stdin" not in question.prompt


def test_a_dataset_on_disk_is_read_like_one_of_the_hub(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([ROWS["aime"]]).save_to_disk(str(tmp_path / "aime"))
    source = SourceConfig(kind="hub", path=str(tmp_path / "aime"), format="aime")
    assert [q.id for q in load_questions(source)] == ["1983-1"]


def test_plain_rows_filters_and_names(tmp_path: Path) -> None:
    rows = [{"n": i, "q": f"How many {i}?", "a": i, "kind": "xy"[i % 2]} for i in range(6)]
    text = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + "\r\n\r\n"
    path = tmp_path / "mine.jsonl"
    path.write_bytes(text.encode())
    source = SourceConfig(
        kind="file",
        path=str(path),
        id_key="n",
        question_key="q",
        answer_key="a",
        answer="number",
        where={"kind": ["y"]},
        template="Q: {question}",
    )
    questions = load_questions(source, limit=2)
    assert [(q.id, q.prompt, q.answer) for q in questions] == [
        ("1", "Q: How many 1?", "1"),
        ("3", "Q: How many 3?", "3"),
    ]
    assert questions[0].source == "mine"


def test_abacus_problems_are_distinct_and_the_same_again() -> None:
    source = SourceConfig(count=50, split="test", levels=[1], seed=3)
    questions = load_questions(source)
    assert len({q.prompt for q in questions}) == len({q.id for q in questions}) == 50
    assert load_questions(source, limit=7) == questions[:7]


GOOD = {"id": "a", "question": "How many?"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"id": "b"}], r":2: key 'question' is missing \(the row has id\)"),
        ([GOOD, {"id": "b", "question": None}], ":2: key 'question' is NoneType, not a string"),
        ([GOOD, {"id": "b", "question": "  "}], ":2: key 'question' is empty"),
        ([GOOD, {"id": [1], "question": "x"}], ":2: key 'id' is list, not a string"),
        ([GOOD, {"id": "b", "question": "\ud800"}], ":2: key 'question' is not valid Unicode"),
        ([GOOD, {"id": "b", "question": "x"}, GOOD], ":3: id 'a' was already in .*:1: ids must"),
        ([GOOD, "{"], ":2: not valid JSON: "),
        ([GOOD, "[1]"], ":2: a row is a JSON object, not list"),
        ([GOOD, "null"], ":2: a row is a JSON object, not NoneType"),
        ([""], "it has no rows: there is nothing to ask"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(DataError, match=f"x.jsonl{message}|x.jsonl: {message}") as raised:
        load_questions(SourceConfig(kind="file", path=path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "the file is empty"),
        ("x.jsonl", b'{"id": "a", "question": "caf\xe9"}\n', "x.jsonl:1: not UTF-8 .byte 28"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer"),
        ("x.csv", b"id,question\n", "give a .jsonl or a .parquet file"),
        ("x.parquet", b"PAR1 cut short", "not a whole parquet file"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_questions(SourceConfig(kind="file", path=str(path)))
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        load_questions(SourceConfig(kind="file", path=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(DataError, match=r"no/such-set: the dataset cannot be loaded .*network"):
        load_questions(SourceConfig(kind="hub", path="no/such-set"))
    path = write(tmp_path / "x.jsonl", GOOD)
    with pytest.raises(DataError, match="key 'year' of source.where is missing"):
        load_questions(SourceConfig(kind="file", path=path, where={"year": [1]}))
    with pytest.raises(DataError, match="no row has {'id': "):
        load_questions(SourceConfig(kind="file", path=path, where={"id": ["z"]}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "file"}, "source.path=None"),
        ({"path": "x"}, "abacus has no file"),
        ({"split": "dev"}, "source.split='dev'"),
        ({"template": "Q:"}, "{question} must stand in it once"),
        ({"levels": [0]}, "source.levels"),
        ({"count": 0}, "source.count=0"),
    ],
)
def test_settings_that_contradict(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SourceConfig(**values)
