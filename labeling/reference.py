"""The plain way to label: Hugging Face `generate`, one branch at a time, nothing shared.

What the pipeline is checked against and measured by. Greedy, verified by the final answer; rules
are written down again rather than imported, so that a slip in one place shows.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
CLOSE = "</think>"
IDENTICAL, NEUTRAL, DIVERGENT, UNLABELED = 0, 1, 2, -1


@dataclass(slots=True)
class PlainLabels:
    """What the plain way says of one question; `num_written` tokens in `seconds`."""

    tokens: list[int]
    candidates: list[int]
    labels: list[int]
    step_labels: list[int]
    num_written: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class PlainLabeler:
    """Labels one question after the other.

    Args:
        slm: with transformers' own attention.
        llm: the same.
        tokenizer: of both.
        extract: the final answer in a text.
        max_tokens: longest response, and longest continuation.
        max_step_tokens: longest step.
    """

    def __init__(
        self,
        slm: PreTrainedModel,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        extract: Callable[[str], str | None],
        *,
        max_tokens: int,
        max_step_tokens: int = 512,
    ) -> None:
        self.slm, self.llm, self.tokenizer, self.extract = slm, llm, tokenizer, extract
        self.max_tokens, self.max_step_tokens = max_tokens, max_step_tokens
        self._num_written = 0

    @torch.inference_mode()
    def label(self, question: str, *, steps: bool = True) -> PlainLabels | None:
        """Labels of one question's answer; None if it does not end or has no final answer."""
        self._num_written, clock = 0, _Clock()
        message = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = self._generate(self.llm, prompt, self.max_tokens)
        answer = self._answer(tokens)
        clock.book("respond")
        if answer is None:
            return None
        logits = self.slm(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[
            0, len(prompt) - 1 :
        ]
        candidates = logits.argmax(-1).tolist()
        clock.book("compare")
        labels = [IDENTICAL] * len(tokens)
        for p, (token, candidate) in enumerate(zip(tokens, candidates, strict=True)):
            if token != candidate:
                ended = candidate == self.tokenizer.eos_token_id
                start = tokens[:p] + [candidate]
                branch = (
                    start
                    if ended
                    else start + self._generate(self.llm, prompt + start, self.max_tokens)
                )
                labels[p] = NEUTRAL if self._answer(branch) == answer else DIVERGENT
        step_labels = [UNLABELED] * len(tokens)
        for p in self._step_starts(tokens) if steps else []:
            step_labels[p] = self._step_label(prompt, tokens, p, answer)
        clock.book("continue")
        return PlainLabels(
            tokens, candidates, labels, step_labels, self._num_written, clock.seconds
        )

    def _step_label(self, prompt: list[int], tokens: list[int], position: int, answer: str) -> int:
        before = tokens[:position]
        stop = [_StepEnd(self.tokenizer, len(prompt) + position)]
        step = self._generate(self.slm, prompt + before, self.max_step_tokens, stop)
        own = tokens[position:]
        ends = (n for n in range(1, len(own)) if _ends_step(self._text(own[:n])))
        if step == own[: next(ends, len(own))]:
            return IDENTICAL
        start = before + step
        if step[-1] != self.tokenizer.eos_token_id:
            start += self._generate(self.llm, prompt + start, self.max_tokens)
        return NEUTRAL if self._answer(start) == answer else DIVERGENT

    def _step_starts(self, tokens: list[int]) -> list[int]:
        """Positions after a delimiter, up to the closing tag; white space opens no step."""
        starts, begin = [0], 0
        for p in range(len(tokens)):
            text = self._text(tokens[begin : p + 1])
            if CLOSE in text:
                break
            if _ends_step(text):
                begin = p + 1
                starts.append(begin)
        return starts

    def _generate(
        self, model: PreTrainedModel, ids: list[int], max_tokens: int, stop: list[Any] | None = None
    ) -> list[int]:
        batch = torch.tensor([ids])
        out: Any = model.generate(  # type: ignore[operator]
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=stop,
        )
        written = out[0, len(ids) :].tolist()
        self._num_written += len(written)
        return written

    def _answer(self, tokens: list[int]) -> str | None:
        """The final answer of a text that has ended."""
        if tokens[-1] != self.tokenizer.eos_token_id:
            return None
        text = self._text(tokens[:-1])
        return self.extract(text) if CLOSE in text else None

    def _text(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(tokens))


class _StepEnd(StoppingCriteria):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        text = str(self.tokenizer.decode(input_ids[0, self.start :]))
        return torch.tensor([_ends_step(text)])


def _ends_step(text: str) -> bool:
    return CLOSE in text or BLANK_LINE.search(text.lstrip()) is not None


class _Clock:
    """Seconds since the last booking, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def book(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
