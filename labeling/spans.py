"""Spans: the sentence or step around a position, read off the text as routing reads it.

`pattern` None stands for a span that goes on to the end of the text. `close`, the closing think
tag, ends any other span.
"""

import re

from r2r_glimp.routing.steps import ends_step


def span_ends(text: str, pattern: re.Pattern[str] | None, close: str | None) -> bool:
    """Whether a span's text so far ends it."""
    if pattern is None:
        return False
    return ends_step(text, pattern) or (close is not None and close in text)


def span_length(
    pieces: list[str], lead: str, pattern: re.Pattern[str] | None, close: str | None
) -> int:
    """Tokens, of these texts, that belong to the span that `lead` begins; all if none ends it."""
    if pattern is None:
        return len(pieces)
    text = lead
    for number, piece in enumerate(pieces, start=1):
        text += piece
        if span_ends(text, pattern, close):
            return number
    return len(pieces)


def span_leads(pieces: list[str], pattern: re.Pattern[str] | None, close: str | None) -> list[str]:
    """For each token, the text of its span that stands before it; empty where no span ends."""
    if pattern is None:
        return [""] * len(pieces)
    leads, text = [], ""
    for piece in pieces:
        leads.append(text)
        text += piece
        if span_ends(text, pattern, close):
            text = ""
    return leads
