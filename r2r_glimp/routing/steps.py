"""Steps: where one ends in a text, and when a sequence of them goes in circles.

Works on text, never on token ids: ".\\n\\n" is one token in Qwen, and "\\n" + "\\n" are two.
"""

import re
from functools import lru_cache

from r2r_glimp.core import UsageError

DELIMITERS = {
    "blank_line": r"\n[^\S\n]*\n",
    "newline": r"\n",
    # A full stop at the very end of the text so far, unless a digit stands before it ("3." may
    # become "3.14").
    "sentence": r"(?<!\d)[.!?。！？]+[\"'”’)\]]*\s*\Z|\n",
}
# At which a server may stop that writes a step; whether one is over is for the pattern to say.
STOP_STRINGS = {"blank_line": ("\n\n",), "newline": ("\n",), "sentence": (". ", "? ", "! ", "\n")}
MAX_PERIOD = 3


@lru_cache
def delimiter_pattern(delimiter: str) -> re.Pattern[str]:
    """The compiled pattern of a delimiter's name or `regex:PATTERN`.

    Raises:
        UsageError: unknown name, or a pattern that does not compile or matches the empty string.
    """
    if delimiter in DELIMITERS:
        return re.compile(DELIMITERS[delimiter])
    if not delimiter.startswith("regex:"):
        raise UsageError(
            f"unknown delimiter {delimiter!r}: choose {', '.join(DELIMITERS)} or regex:PATTERN"
        )
    try:
        pattern = re.compile(delimiter.removeprefix("regex:"))
    except re.error as error:
        raise UsageError(f"delimiter {delimiter!r} is not a regular expression: {error}") from None
    if pattern.match(""):
        raise UsageError(
            f"delimiter {delimiter!r} matches the empty string: every token would end a step"
        )
    return pattern


def ends_step(step_text: str, pattern: re.Pattern[str]) -> bool:
    """Whether a step's text so far has a delimiter after its content; leading white space is no
    step of its own."""
    return pattern.search(step_text.lstrip()) is not None


def repeats(steps: list[str]) -> bool:
    """Whether the last steps say the same again, with a period of one to three steps."""
    return any(
        len(steps) >= 2 * period and steps[-period:] == steps[-2 * period : -period]
        for period in range(1, MAX_PERIOD + 1)
    )
