"""Marks, tables and histograms."""

import io

from r2r_glimp.cli.outputs import TokenTexts, output_to_dict, to_json_line
from r2r_glimp.cli.render import Marks, SpanWriter, figures, format_bytes, histogram, visible
from r2r_glimp.core import FinishEvent, RequestOutput, Stats, TokenEvent, TokenLogprob


def marked(*spans, stream=None, color=False):
    out = io.StringIO()
    writer = SpanWriter(out, Marks(stream or out, color=color))
    for source, text in spans:
        writer.write(source, text)
    writer.close()
    return out.getvalue()


def test_spans_are_marked_once():
    spans = [("llm", "a"), ("llm", "b"), ("slm", ""), ("slm", "c"), ("llm", "d")]
    assert marked(*spans) == "⟦ab⟧c⟦d⟧"
    assert marked(*spans, color=True) == "\x1b[1;4;36mab\x1b[0mc\x1b[1;4;36md\x1b[0m"


def test_a_stream_without_the_brackets():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert marked(("llm", "a"), stream=stream) == "[[a]]"


def test_text_has_no_power_over_the_terminal():
    assert visible("a\tb\nc\x1b[2J\r\x9b") == "a\tb\nc␛[2J␍�"


def test_figures_are_totals():
    stats = [Stats(slm_tokens=3, llm_tokens=1, decisions=4, deferrals=1, switches=2)] * 2
    line = figures(stats, 2.0, ["stop", "length"])
    assert line.startswith(
        "LLM share 25.0% | 8 tokens (6 SLM, 2 LLM) | 8 decisions, 2 to the LLM | 4 switches"
    )
    assert "| 4 tokens/s |" in line and line.endswith("| 1 ended by length")


def test_format_bytes():
    assert [format_bytes(n) for n in (12, 1536, 5 * 2**20, 3 * 2**30)] == [
        "12 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]


def test_histogram_marks_the_threshold():
    lines = histogram([0.0, 0.1, 0.1, 1.0], threshold=0.6, num_bins=2).splitlines()
    assert len(lines) == 2 and lines[0].endswith(" 3") and "< threshold 0.6" in lines[1]
    assert histogram([0.5, 0.5], num_bins=3).splitlines()[0].endswith(" 2")


def output(text, logprobs=None):
    return RequestOutput(
        request_id="r",
        index=0,
        prompt_token_ids=[1],
        token_ids=[2, 3],
        text=text,
        sources=["slm", "llm"],
        finish_reason="stop",
        stats=Stats(slm_tokens=1, llm_tokens=1),
        logprobs=logprobs,
    )


def test_text_held_back_belongs_to_the_last_token():
    texts = TokenTexts()
    assert texts.add(TokenEvent("r", 0, 0, 2, "slm", "a")) is None
    assert texts.add(TokenEvent("r", 0, 1, 3, "llm", "")) is None
    assert texts.add(FinishEvent("r", 0, output("ab"))) == ["a", "b"]


def test_json_has_no_infinities():
    record = output_to_dict(output("é", [TokenLogprob(2, float("-inf"))]), ["é", ""])
    line = to_json_line(record)
    assert '"logprob": null' in line and '"text": "é"' in line
    assert '"llm_share": 0.5' in line and "trace" not in line
