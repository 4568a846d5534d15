"""Reasoning apart from the answer, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2r_glimp.routing.tags import ThinkTags
from r2r_glimp.serve.reasoning import Splitter

TEXT = "one\n\ntwo < 3\n</think>\n\nAnswer <4>"
CASES = [
    ("thinking", TEXT, "one\n\ntwo < 3\n", "Answer <4>"),
    ("thinking", "\nno end </thin", "no end </thin", ""),
    ("thinking", "</think>\n\nAnswer", "", "Answer"),
    ("preamble", "\n<think>\nwhy</think>x", "why", "x"),
    ("preamble", "<thin air", "", "<thin air"),
    ("preamble", "hello", "", "hello"),
    ("answer", "a </think> b", "", "a </think> b"),
]


@pytest.mark.parametrize(("section", "text", "reasoning", "content"), CASES)
@given(data=st.data())
def test_any_cut_gives_the_same(section, text, reasoning, content, data) -> None:
    splitter = Splitter(ThinkTags(), section)
    got = ["", ""]
    while text:
        size = data.draw(st.integers(1, len(text)))
        piece = splitter.add(text[:size])
        got[0], got[1] = got[0] + piece.reasoning, got[1] + piece.content
        text = text[size:]
    last = splitter.add("", final=True)
    assert (got[0] + last.reasoning, got[1] + last.content) == (reasoning, content)


def test_without_tags_all_is_content() -> None:
    splitter = Splitter(None, "thinking")
    assert splitter.add("a </think> b").content == "a </think> b" and not splitter.in_reasoning
