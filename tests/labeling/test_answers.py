"""Final answers in texts."""

import pytest

from labeling.answers import final_abacus, final_boxed, final_choice, final_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3.</think>\n\nAnswer 4.", "4"),
        ("Answer 3.</think>\n\nNone.", None),
        ("</think>Answer 3. No: Answer 7.", "7"),
        ("", None),
    ],
)
def test_abacus(text: str, answer: str | None) -> None:
    assert final_abacus(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}</think> It is \boxed{042}.", "42"),
        (r"\boxed{000}", "0"),
        (r"\boxed{\frac{1}{2}} and \boxed{ \frac{3}{ 4} }.", r"\frac{3}{4}"),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxed{1}</think> none", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert final_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: A. No, the answer is (C).", "C"),
        ("**Answer:** B", "B"),
        (r"Answer: \boxed{D}", "D"),
        (r"Thus \boxed{A}.", "A"),
        (r"\boxed{12}", None),
        ("Answer: A</think> unsure", None),
    ],
)
def test_choice(text: str, answer: str | None) -> None:
    assert final_choice(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("7</think>So 1,200.50 in all, not -3.", "-3"), ("1,200 of them", "1200"), ("none", None)],
)
def test_number(text: str, answer: str | None) -> None:
    assert final_number(text) == answer
