"""Reading prompts: every bad line has its number, before a model is loaded."""

import pytest

from r2r_glimp.cli.requests import read_batch
from r2r_glimp.core import DataError, RoutingParams, SamplingParams


def read(data: bytes, tmp_path, name="in.jsonl", input_format="auto"):
    path = tmp_path / name
    path.write_bytes(data)
    return read_batch(None, str(path), input_format, SamplingParams(), RoutingParams())


def test_rows_with_options_of_their_own(tmp_path):
    batch = read(
        b'\xef\xbb\xbf{"id": 7, "prompt": "a", "temperature": 0.5, "stop": ["x"], "seed": 3}\r\n'
        b"\n"
        b'{"messages": [{"role": "user", "content": "b"}], "router": "llm"}\n'
        b'{"id": "z", "token_ids": [1, 2], "granularity": "step", "threshold": 2, "trace": true}',
        tmp_path,
    )
    one, two, three = batch.requests
    assert (one.name, one.id, one.line, one.prompt, one.is_text) == ("7", 7, 1, "a", True)
    assert one.sampling == SamplingParams(temperature=0.5, stop=("x",), seed=3)
    assert (two.name, two.line, two.is_text) == ("line-3", 3, False)
    assert two.routing == RoutingParams(router="llm")
    assert (three.name, three.prompt) == ("z", [1, 2])
    assert three.routing == RoutingParams(granularity="step", threshold=2, trace=True)


BAD_LINES = [
    (b"{", "not valid JSON"),
    (b'{"prompt": "a"} x', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid UTF-8 (byte 13 of the line)"),
    (b"[1, 2]", "expected a JSON object, found a list"),
    (b'"text"', "found a string"),
    (b"null", "found null"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN"),
    (b"{}", "exactly one of prompt, messages, token_ids: found none"),
    (b'{"prompt": "a", "token_ids": [1]}', "found prompt and token_ids"),
    (b'{"prompt": ""}', "empty"),
    (b'{"prompt": " \\n"}', "empty"),
    (b'{"prompt": 3}', "prompt is a number, wanted a string"),
    (b'{"prompt": "\\ud800"}', "not valid Unicode"),
    (b'{"messages": []}', "empty"),
    (b'{"messages": "hi"}', "wanted a list"),
    (b'{"messages": ["hi"]}', "messages holds a string, wanted an object"),
    (b'{"token_ids": []}', "empty"),
    (b'{"token_ids": ["1"]}', "token_ids holds a string"),
    (b'{"token_ids": [true]}', "token_ids holds a boolean"),
    (b'{"prompt": "a", "id": [1]}', "id="),
    (b'{"prompt": "a", "id": ""}', "id="),
    (b'{"prompt": "a", "temprature": 1}', "unknown key 'temprature'"),
    (b'{"prompt": "a", "temperature": "hot"}', "temperature='hot' is out of range"),
    (b'{"prompt": "a", "top_p": 3}', "top_p"),
    (b'{"prompt": "a", "stop": 5}', "stop=5 is not a list"),
    (b'{"prompt": "a", "ignore_eos": "no"}', "ignore_eos='no' is not true or false"),
    (b'{"prompt": "a", "granularity": "word"}', "granularity"),
    (b'{"prompt": "a", "delimiter": 4}', "delimiter=4 is not a string"),
    (b'{"prompt": "a", "delimiter": "regex:("}', "not a regular expression"),
    (b'{"prompt": "a", "router": "llm", "threshold": 1}', "router llm"),
    (b'{"prompt": "b", "id": "good"}', "id 'good' was used in line 1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[why for _, why in BAD_LINES])
def test_a_bad_line_is_named(cli, jsonl, line, message):
    path = jsonl({"id": "good", "prompt": "fine"}, b"", line)
    result = cli("generate", "--json", "--file", path)
    assert result.code == 2
    assert f"{path}, line 3: " in result.error and message in result.error
    assert "--skip_invalid" in result.error


def test_many_bad_lines_are_counted(tmp_path):
    batch = read(b'{}\n{"prompt": "a"}\n[\n3\n', tmp_path)
    assert [line for line, _ in batch.problems] == [1, 3, 4]
    with pytest.raises(DataError, match=r"line 1: .* \(and 2 more bad lines\)"):
        batch.check(skip_invalid=False)
    batch.check(skip_invalid=True)
    assert batch.skipped()[-1].endswith("3 of 4 lines skipped")


def test_nothing_left_to_run(cli, jsonl):
    result = cli("generate", "--json", "--skip_invalid", "--file", jsonl(b"{", b"[]"))
    assert result.code == 2 and "holds no request: all 2 lines are invalid" in result.error


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jsonl", b"", "holds no request"),
        ("blank.jsonl", b"\n \n", "holds no request"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n", "is empty"),
        ("latin.txt", b"one\ntwo\n caf\xe9\n", "line 3: not valid UTF-8"),
    ],
)
def test_a_bad_file(cli, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    result = cli("generate", "--file", tmp_path / name)
    assert result.code == 2 and message in result.error


def test_a_file_that_cannot_be_read(cli, tmp_path):
    result = cli("generate", "--file", tmp_path / "none.txt")
    assert result.code == 2 and "none.txt: No such file" in result.error
    assert cli("generate", "--file", tmp_path).code == 2


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (("",), b"", "the prompt is empty"),
        (("  ",), b"", "the prompt is empty"),
        ((), b"", "nothing on stdin"),
        (("-",), b"\n", "nothing on stdin"),
        (("-",), b"a\nb\xff", "stdin, line 2: not valid UTF-8"),
        (("\udc80",), b"", "not valid Unicode"),
    ],
)
def test_a_bad_prompt(cli, argv, stdin, message):
    result = cli("generate", *argv, stdin=stdin)
    assert result.code == 2 and message in result.error


def test_no_prompt_on_a_terminal(cli):
    result = cli("generate", terminal=True)
    assert result.code == 2 and "nothing to write about" in result.error


def test_text_and_jsonl_are_told_apart(tmp_path):
    row, text = b'{"prompt": "a"}\n', b'{"not": "a request"}\n'
    assert read(row, tmp_path).is_jsonl
    assert not read(row, tmp_path, name="in.txt").is_jsonl
    assert read(row, tmp_path, name="in.txt", input_format="jsonl").is_jsonl
    assert not read(row, tmp_path, input_format="text").is_jsonl
    assert read(text, tmp_path, name="in.txt").requests[0].prompt == text.decode()
