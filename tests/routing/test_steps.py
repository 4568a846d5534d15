"""Steps in text: where they end, and when they go in circles."""

import pytest

from r2r_glimp.routing.steps import delimiter_pattern, ends_step, repeats


@pytest.mark.parametrize(
    ("delimiter", "text", "ended"),
    [
        ("blank_line", "So 4.\n\n", True),
        ("blank_line", "So 4.\n \t\n", True),
        ("blank_line", "So 4.\n", False),
        ("blank_line", "\n\n", False),  # white space alone is no step
        ("blank_line", "\n\nSo 4.\n", False),
        ("newline", "So 4.\n", True),
        ("newline", "\nSo 4.", False),
        ("sentence", "So it is.", True),
        ("sentence", 'So "it is."', True),
        ("sentence", "So it is", False),
        ("sentence", "So 3.", False),  # may become 3.14
        ("sentence", "So 3.14 holds!", True),
        ("sentence", "所以。", True),
        ("regex:Wait|But", "So 4. Wait", True),
        ("regex:Wait|But", "So 4. ", False),
    ],
)
def test_ends_step(delimiter: str, text: str, ended: bool) -> None:
    assert ends_step(text, delimiter_pattern(delimiter)) is ended


@pytest.mark.parametrize(
    ("steps", "looping"),
    [
        ([], False),
        (["a"], False),
        (["a", "b"], False),
        (["a", "a"], True),
        (["a", "b", "a"], False),
        (["a", "b", "a", "b"], True),
        (["x", "a", "b", "c", "a", "b", "c"], True),
        (["a", "b", "c", "d", "a", "b", "c", "d"], False),  # period 4
    ],
)
def test_repeats(steps: list[str], looping: bool) -> None:
    assert repeats(steps) is looping
