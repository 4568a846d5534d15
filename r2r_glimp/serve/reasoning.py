"""Reasoning apart from the answer: cuts a stream of text at its think tags.

<think>\\nSum cups: …\\n</think>\\n\\nAnswer 4.
        └ reasoning ─┘           └ content
"""

from dataclasses import dataclass

from r2r_glimp.routing.tags import Section, ThinkTags


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is ready: of the reasoning, of the answer, or of both where a tag lies between."""

    reasoning: str = ""
    content: str = ""


class Splitter:
    """Cuts one completion's text; tags and the line breaks after them belong to neither side.

    Args:
        tags: the pair's think tags; without them all text is content.
        section: where the prompt leaves the thinking.
    """

    def __init__(self, tags: ThinkTags | None, section: Section) -> None:
        self.tags = tags
        self.section: Section = section if tags is not None else "answer"
        self._held = ""  # may be the beginning of a tag
        self._at_start = section == "thinking"  # nothing of the section has been given out yet

    @property
    def in_reasoning(self) -> bool:
        return self.section == "thinking"

    def add(self, text: str, *, final: bool = False) -> Piece:
        """What became ready by some more text; with `final`, all that is left."""
        self._held += text
        reasoning = content = ""
        if self.section == "preamble":
            self._open(final)
        if self.section == "thinking":
            assert self.tags is not None
            before, found, after = self._held.partition(self.tags.close)
            if found:
                reasoning, self._held = self._give(before), after
                self.section, self._at_start = "answer", True
            else:
                end = len(before) - (0 if final else _overlap(before, self.tags.close))
                reasoning, self._held = self._give(before[:end]), before[end:]
        if self.section == "answer":
            content, self._held = self._give(self._held), ""
        return Piece(reasoning, content)

    def _open(self, final: bool) -> None:
        """Before anything else a model may open its thinking itself."""
        assert self.tags is not None
        text = self._held.lstrip()
        if text.startswith(self.tags.open):
            self._held = text.removeprefix(self.tags.open)
            self.section, self._at_start = "thinking", True
        elif final or not self.tags.open.startswith(text):
            # It thinks without its tag if a closing one comes; a reader cannot wait for that.
            self.section = "answer"

    def _give(self, text: str) -> str:
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        return text


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
