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
        self._read = len(self._window)  # tokens of the window whose text is out,
        self._out = self._decode(self._window)  # and that text

    @property
    def complete(self) -> bool:
        """Whether every token's text is out."""
        return self._read == len(self._window)

    def append(self, token: int) -> str:
        """The text that became readable."""
        self._window.append(token)
        text = self._decode(self._window)
        pending = len(self._window) - self._read
        if text.endswith("\ufffd") and pending < MAX_PENDING:
            return ""
        new = text[len(self._out) :]
        if len(self._window) > 2 * CONTEXT + MAX_PENDING:
            # The tokens just written become the context of the next.
            self._window = self._window[-max(pending, CONTEXT) :]
            text = self._decode(self._window)
        self._read, self._out = len(self._window), text
        return new

    def flush(self) -> str:
        """Text still held back when the request ends."""
        if self.complete:
            return ""
        before, self._out = self._out, self._decode(self._window)
        self._read = len(self._window)
        return self._out[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
