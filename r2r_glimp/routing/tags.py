"""Think tags: whether a tokenizer has them, and where a prompt leaves the thinking."""

from dataclasses import dataclass
from typing import Literal

Section = Literal["preamble", "thinking", "answer"]


@dataclass(frozen=True, slots=True)
class ThinkTags:
    open: str = "<think>"
    close: str = "</think>"


def find_tags(vocabulary: dict[str, int]) -> ThinkTags | None:
    """The think tags if both are tokens of the vocabulary, None for a model without them."""
    tags = ThinkTags()
    return tags if tags.open in vocabulary and tags.close in vocabulary else None


def section_of(tail: str, tags: ThinkTags | None) -> Section:
    """Where generation starts, read off the end of the prompt.

    Args:
        tail: the prompt's text after its last special token, so that a tag inside a user's message
            does not count.

    Returns:
        `thinking` after an open tag, or for a model without tags; `answer` after a closed one; else
        `preamble`, the stretch in which the model may still open its thinking itself.
    """
    if tags is None:
        return "thinking"
    opened, closed = tail.rfind(tags.open), tail.rfind(tags.close)
    if opened == closed == -1:
        return "preamble"
    return "thinking" if opened > closed else "answer"
