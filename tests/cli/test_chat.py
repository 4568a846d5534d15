"""`chat`: turns, commands, and what is remembered."""

import os
import signal

import pytest

from r2r_glimp.cli.chat import without_thinking
from r2r_glimp.engine.engine import Engine


@pytest.fixture
def chat(cli, pair):
    def run(*lines, args=(), **how):
        return cli("chat", *pair, *args, stdin="".join(f"{x}\n" for x in lines).encode(), **how)

    return run


@pytest.fixture
def sent(monkeypatch):
    """The messages that each turn sends, with an answer made up for it."""
    seen = []
    stream = Engine.stream

    def record(self, prompt, *args):
        seen.append([(m["role"], m["content"]) for m in prompt])
        return stream(self, prompt, *args)

    monkeypatch.setattr(Engine, "stream", record)
    monkeypatch.setattr("r2r_glimp.cli.chat.without_thinking", lambda text, opened: "an answer")
    return seen


def test_turns_build_on_each_other(chat, sent):
    result = chat("one", "", "two \\", "lines", "/reset", "three", args=["--system", "Be brief."])
    assert result.code == 0
    system, one = ("system", "Be brief."), ("user", "one")
    assert sent == [
        [system, one],
        [system, one, ("assistant", "an answer"), ("user", "two \nlines")],
        [system, ("user", "three")],
    ]


def test_later_turns_hit_the_prefix_cache(chat, sent):
    out = chat("a question with quite some words in it", "/stats", "another", "/stats").out
    one, two = (line for line in out.splitlines() if "| LLM share" in line)
    assert one.startswith("1 turn |") and "prefix cache" not in one
    assert two.startswith("2 turns |") and "prompt tokens from the prefix cache" in two


def test_thinking_that_never_ended_is_forgotten(chat, sent, monkeypatch):
    monkeypatch.setattr("r2r_glimp.cli.chat.without_thinking", without_thinking)
    result = chat("one", "two", args=["--max_tokens", "1"])  # the template opens the thinking
    assert sent == [[("user", "one")], [("user", "two")]]
    assert "this turn is forgotten" in result.err and "ended by length" in result.err


@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [
        ("so 3.\n\n</think>\n\nAnswer 3.", True, "Answer 3."),
        ("<think>a</think>b", False, "b"),
        ("still thinking", True, ""),
        ("<think>still", False, ""),
        ("no tags", False, "no tags"),
    ],
)
def test_only_the_answer_is_sent_again(text, opened, answer):
    assert without_thinking(text, opened=opened) == answer


def test_commands(chat):
    result = chat(
        *("/help", "/stats", "/threshold 0.25", "/granularity step", "/threshold", "/quit", "no"),
        args=["--router", "entropy"],
    )
    assert result.code == 0 and result.err == ""
    legend, *lines = result.out.splitlines()
    assert "router entropy, per token, threshold 0.45" in legend
    assert "no answer is finished yet" in lines
    assert [line for line in lines if line.startswith("router")] == [
        "router entropy, per token, threshold 0.25",
        "router entropy, per step, threshold 0.25",
        "router entropy, per step, threshold 1",
    ]


def test_mistakes_are_one_line_and_the_talk_goes_on(chat, sent):
    lines = ("/threshold high", "/granularity word", "/granularity", "/what", "x " * 2000, "fine")
    result = chat(*lines)
    assert result.code == 1  # a script must be able to tell
    messages = [line for line in result.err.splitlines() if ": error: " in line]
    for message, words in zip(
        messages,
        (
            "takes a number",
            "granularity='word'",
            "granularity=''",
            "unknown command /what",
            "1,024",
        ),
        strict=True,
    ):
        assert words in message
    assert sent[-1] == [("user", "fine")]


def test_a_threshold_without_a_meaning(chat):
    result = chat("/threshold 1", args=["--router", "slm"])
    assert "never decides" in result.err


def test_a_line_that_is_not_utf8(cli, pair):
    result = cli("chat", *pair, stdin=b"\xff\nfine\n")
    assert result.code == 1 and "stdin, line 1: not valid UTF-8" in result.err
    assert "internal error" not in result.err


@pytest.mark.parametrize("option", [("--n", "2"), ("--logprobs", "1"), ("--trace",)])
def test_options_of_generate(cli, option):
    result = cli("chat", *option)
    assert result.code == 2 and "for generate" in result.error


def test_a_pair_without_a_chat_template(cli, models):
    plain = ("--slm", models / "plain", "--llm", models / "plain", "--kv_memory", "4MiB")
    result = cli("chat", *plain)
    assert result.code == 2 and "chat template" in result.error


@pytest.fixture
def type_in(monkeypatch):
    """What is typed at a terminal: lines, or SIGINT for Ctrl-C; then Ctrl-D."""

    def typing(*typed):
        keys = iter(typed)

        def read(prompt):
            key = next(keys, None)
            if key is None:
                raise EOFError
            if key is signal.SIGINT:
                os.kill(os.getpid(), signal.SIGINT)
            return key

        monkeypatch.setattr("builtins.input", read)

    return typing


def test_ctrl_c_stops_an_answer_and_then_leaves(cli, pair, sent, type_in, monkeypatch):
    step, calls = Engine.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    type_in("one", "two", signal.SIGINT)
    result = cli("chat", *pair, "--router", "slm", terminal=True)
    assert result.code == 130 and "r2r-glimp: info: stopped" in result.err
    assert len(sent) == 2 and sent[1][-2:] == [("assistant", "an answer"), ("user", "two")]
    assert len(calls) == 4 + 12  # the first answer was cut, the second one was not


def test_ctrl_d_leaves(cli, pair, type_in):
    type_in("/stats")
    assert cli("chat", *pair, terminal=True).code == 0
