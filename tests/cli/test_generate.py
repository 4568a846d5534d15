"""`generate` from argument to output, on a tiny random pair."""

import json
import os
import signal
import threading
import time

import pytest

from r2r_glimp.core import EngineError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.runner import ModelRunner

ROUTED = ("--router", "random", "--threshold", "0.5", "--seed", "1")


@pytest.fixture
def generate(cli, pair):
    return lambda *args, **how: cli("generate", *pair, *args, **how)


def rebuild(record):
    """The text with the LLM's spans in brackets."""
    text, inside = "", False
    for source, piece in zip(record["sources"], record["token_texts"], strict=True):
        if piece and (source == "llm") != inside:
            text, inside = text + ("⟧" if inside else "⟦"), not inside
        text += piece
    return text + "⟧" * inside


def test_people_see_who_wrote_what(generate):
    shown = generate("Hello", *ROUTED)
    (record,) = generate("Hello", *ROUTED, "--json").records
    assert {"slm", "llm"} == set(record["sources"])
    legend, rest = shown.out.split("\n\n", 1)
    text, figures, end = rest.rsplit("\n", 2)
    assert legend == ("SLM plain, ⟦LLM in brackets⟧ | router random, per token, threshold 0.5")
    from r2r_glimp.cli.render import visible

    assert text == visible(rebuild(record)) + "\n"
    stats = record["stats"]
    assert f"LLM share {stats['llm_share']:.1%} | 12 tokens" in figures and end == ""
    assert "tokens/s" in figures and "peak memory" in figures and "1 ended by length" in figures
    assert shown.code == 0 and shown.err == ""


def test_colour_where_it_is_wanted(generate, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;4;36m" in generate("Hello", "--router", "llm").out
    assert "\x1b" not in generate("Hello", "--router", "llm", "--no_color").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in generate("Hello", "--router", "llm").out


def test_quiet_is_the_text_alone(generate):
    (record,) = generate("Hello", "--json", "--router", "slm").records
    from r2r_glimp.cli.render import visible

    assert generate("Hello", "--quiet", "--router", "slm").out == visible(record["text"]) + "\n"


def test_json_holds_the_output(generate):
    result = generate("Hello", *ROUTED, "--json", "--trace", "--logprobs", "2")
    (record,) = result.records
    assert record["request_id"] == "request-0" and record["index"] == 0
    assert record["finish_reason"] == "length" and record["error"] is None
    assert len(record["token_ids"]) == len(record["sources"]) == len(record["token_texts"]) == 12
    assert "".join(record["token_texts"]) == record["text"]
    assert record["stats"]["llm_share"] == record["sources"].count("llm") / 12
    assert len(record["trace"]) == 12 and record["trace"][0]["score"] is not None
    assert len(record["logprobs"]) == 12 and len(record["logprobs"][0]["top"]) == 2
    assert result.err.startswith("LLM share") and result.err.count("\n") == 1
    (plain,) = generate("Hello", *ROUTED, "--json", "--quiet").records
    assert "trace" not in plain and "logprobs" not in plain
    assert plain["text"] == record["text"]


def test_a_trace_for_people(generate):
    out = generate("Hello", *ROUTED, "--trace").out
    assert "LLM's own choice" in out and len(out.splitlines()) > 12


def test_prompts_become_messages_unless_raw(generate, tokenizer, tmp_path):
    def prompt(*args, **how):
        (record,) = generate("--json", *args, **how).records
        return tokenizer.decode(record["prompt_token_ids"])

    def chat(*messages):
        rows = [{"role": role, "content": text} for role, text in messages]
        return tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)

    (tmp_path / "p.txt").write_text("Hello\n")
    assert prompt("Hello") == chat(("user", "Hello"))
    assert prompt("--file", tmp_path / "p.txt") == chat(("user", "Hello"))
    assert prompt("-", stdin=b"Hello\n") == prompt(stdin=b"Hello\n") == chat(("user", "Hello"))
    system = chat(("system", "Be brief."), ("user", "Hello"))
    assert prompt("Hello", "--system", "Be brief.") == system
    assert prompt("--raw", stdin=b"Hello\n") == "Hello\n"


def test_a_pair_without_a_chat_template(cli, models):
    plain = ("--slm", models / "plain", "--llm", models / "plain", "--kv_memory", "4MiB")
    (record,) = cli("generate", *plain, "--max_tokens", "2", "Hello", "--json").records
    assert record["prompt_token_ids"]
    result = cli("generate", *plain, "Hello", "--system", "x")
    assert result.code == 2 and "chat template" in result.error


def test_a_trained_router(generate, jsonl, step_router):
    """It brings its granularity and threshold; a row may choose it too."""
    out = generate("Hello", "--router", step_router).out
    assert "| router mlp, per step, threshold 0.5\n" in out
    path = jsonl({"prompt": "x", "router": str(step_router), "trace": True})
    (record,) = generate("--file", path, "--json", "--router", "slm").records
    assert 0 <= record["trace"][0]["score"] <= 1
    path = jsonl({"prompt": "x", "granularity": "token"})
    result = generate("--file", path, "--json", "--router", step_router)
    assert result.code == 2 and "line 1: router 'mlp' was trained for" in result.error


def test_several_completions_are_shown_one_by_one(generate):
    out = generate("Hello", "--n", "3", "--temperature", "1", "--seed", "1").out
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [
        f"--- request-0 ({i} of 3)" for i in (1, 2, 3)
    ]


def test_jsonl_in_jsonl_out(generate, jsonl):
    path = jsonl(
        {"id": "long", "prompt": "Hello", "max_tokens": 9},
        {"id": 5, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "n": 2},
        {"token_ids": [5, 6, 7], "router": "llm", "max_tokens": 4, "trace": True},
        {"prompt": "Hello", "granularity": "step", "router": "slm", "max_tokens": 1},
    )
    result = generate("--file", path, "--json")
    assert result.code == 0
    records = {(r["id"], r["line"], r["index"]): r for r in result.records}
    assert set(records) == {("long", 1, 0), (5, 2, 0), (5, 2, 1), (None, 3, 0), (None, 4, 0)}
    assert len(records["long", 1, 0]["token_ids"]) == 9
    assert set(records[None, 3, 0]["sources"]) == {"llm"} and "trace" in records[None, 3, 0]
    assert records[None, 3, 0]["prompt_token_ids"] == [5, 6, 7]
    assert records[None, 3, 0]["request_id"] == "line-3"
    assert result.records[-1]["id"] == "long"  # each is written as it finishes
    piped = generate("--json", stdin=path.read_bytes())
    assert [r["text"] for r in piped.records] == [r["text"] for r in result.records]


def test_jsonl_for_people(generate, jsonl):
    path = jsonl({"id": "a", "prompt": "x"}, {"prompt": "y"})
    out = generate("--file", path).out
    assert "--- a\n" in out and "--- line-2\n" in out


def test_output_goes_to_a_file_once(generate, jsonl, tmp_path):
    path, out = jsonl({"prompt": "x"}, {"prompt": "y"}), tmp_path / "out.jsonl"
    result = generate("--file", path, "--output", out)
    assert result.code == 0 and result.out == "" and result.err.startswith("LLM share")
    before = out.read_text()
    assert len([json.loads(line) for line in before.splitlines()]) == 2
    again = generate("--file", path, "--output", out)
    assert again.code == 2 and "is there already" in again.error and out.read_text() == before
    assert generate("--file", path, "--output", out, "--overwrite").code == 0
    assert generate("--file", path, "--output", os.devnull).code == 0


ENGINE_SAYS_NO = [
    ({"prompt": "x " * 2000}, "context only 1,024"),
    ({"token_ids": [10**6]}, "token ids must be"),
    ({"messages": [{"role": "user"}]}, "role"),
    ({"prompt": "x", "router": "cleverest"}, "unknown router"),
]


@pytest.mark.parametrize(("row", "message"), ENGINE_SAYS_NO)
def test_a_row_the_engine_refuses(generate, jsonl, tmp_path, row, message):
    path, out = jsonl({"prompt": "fine"}, row), tmp_path / "out.jsonl"
    result = generate("--file", path, "--output", out)
    assert result.code == 2 and f"{path}, line 2: " in result.error and message in result.error
    assert not out.exists()
    skipped = generate("--file", path, "--json", "--skip_invalid")
    assert skipped.code == 0 and [r["line"] for r in skipped.records] == [1]
    warnings = [line for line in skipped.err.splitlines() if ": warning: " in line]
    assert f"{path}, line 2: skipped: " in warnings[0]
    assert warnings[1].endswith("1 of 2 lines skipped")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("x " * 2000,), "context only 1,024"),
        (("Hello", "--kv_memory", "32KiB"), "kv_memory is too small for one request"),
        (("Hello", "--kv_memory", "1KiB"), "too small"),
        (("Hello", "--kv_memory", "much"), "is not a size"),
        (("Hello", "--max_batch", "0"), "max_batch"),
        (("Hello", "--device", "tpu"), "device='tpu'"),
        (("Hello", "--dtype", "int4"), "dtype='int4'"),
    ],
)
def test_what_does_not_fit(generate, argv, message):
    result = generate(*argv, "--max_tokens", "500")
    assert result.code == 2 and message in result.error


def test_a_checkpoint_of_pickles(cli, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    result = cli("generate", "Hi", "--slm", tmp_path, "--llm", tmp_path)
    assert result.code == 2 and "pickled" in result.error


def test_failed_requests_do_not_take_others_along(generate, jsonl, monkeypatch):
    forward = ModelRunner.forward

    def failing(self, rows, wanted):
        if any(len(row.tokens) > 60 for row in rows):
            raise EngineError("the sky fell")
        return forward(self, rows, wanted)

    monkeypatch.setattr(ModelRunner, "forward", failing)
    path = jsonl({"id": "good", "prompt": "x"}, {"id": "bad", "prompt": "Hello " * 80})
    result = generate("--file", path, "--json", "--router", "slm", "--max_batch", "1")
    reasons = {r["id"]: (r["finish_reason"], r["error"]) for r in result.records}
    assert reasons["good"] == ("length", None)
    assert reasons["bad"] == ("error", "the SLM failed: the sky fell")
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if ": error: " in line]
    assert errors == [
        "r2r-glimp: error: bad: the SLM failed: the sky fell",
        "r2r-glimp: error: 1 of 2 outputs failed",
    ]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_finished_lines(generate, jsonl, tmp_path, monkeypatch, signum, code):
    step, calls = Engine.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signum)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    path = jsonl({"prompt": "x", "max_tokens": 3}, {"prompt": "y", "max_tokens": 200})
    out = tmp_path / "out.jsonl"
    result = generate("--file", path, "--output", out, "--router", "slm")
    assert result.code == code
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1]
    assert "1 of 2 outputs are finished" in result.err and "Traceback" not in result.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_leaves_what_was_streamed(generate, monkeypatch):
    step, calls = Engine.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    result = generate("Hello", "--router", "llm")
    assert result.code == 130 and result.err == "r2r-glimp: stopped: SIGINT\n"
    text = result.out.split("\n\n", 1)[1]
    assert text.startswith("⟦") and text.endswith("⟧\n")


def test_ctrl_c_of_a_real_process(spawn, pair, jsonl, tmp_path):
    rows = [{"prompt": "x", "max_tokens": 2}] + [{"prompt": "y", "max_tokens": 900}] * 8
    out = tmp_path / "out.jsonl"
    process = spawn(
        *("generate", *pair, "--file", jsonl(*rows), "--output", out, "--router", "slm"),
        *("--ignore_eos", "--max_tokens", "900"),
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    while process.poll() is None and not (out.exists() and out.read_text().count("\n")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    watchdog.cancel()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and stderr.splitlines()[-1] == "r2r-glimp: stopped: SIGINT"
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1]


def test_a_reader_that_is_gone(spawn, pair, jsonl):
    rows = [{"prompt": "x", "max_tokens": n} for n in range(1, 60)]
    process = spawn("generate", *pair, "--file", jsonl(*rows), "--json", "--router", "slm")
    assert process.stdout is not None and process.stderr is not None
    json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
