"""Incremental detokenisation: tokens in, readable text out, never half a character.

A character belongs to the token that completes it. Works on a window of tokens, so the cost of a
token does not grow with the text.
"""

from transformers import PreTrainedTokenizerBase

MAX_PENDING = 8  # no character is longer; what is unreadable after that is shown as it is
CONTEXT = 6  # tokens before the first one that may change how it is written (a leading space, say)


class Detokenizer:
    """Turns one timeline's new tokens into text; special tokens stay visible (think tags must be
    seen)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = prompt[-CONTEXT:]
        self._read = len(self._window)  # tokens of the window whose text is out

    @property
    def complete(self) -> bool:
        """Whether every token's text is out."""
        return self._read == len(self._window)

    def append(self, token: int, *, final: bool = False) -> str:
        """The text that became readable; with `final`, whatever is there."""
        self._window.append(token)
        before = self._decode(self._window[: self._read])
        text = self._decode(self._window)
        pending = len(self._window) - self._read
        if text.endswith("\ufffd") and pending < MAX_PENDING and not final:
            return ""
        # The tokens just written become the context of the next.
        self._window = self._window[-max(pending, CONTEXT) :]
        self._read = len(self._window)
        return text[len(before) :]

    def flush(self) -> str:
        """Text still held back when the request ends."""
        before = self._decode(self._window[: self._read])
        text = self._decode(self._window)
        self._read = len(self._window)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
