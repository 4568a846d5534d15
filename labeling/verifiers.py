"""Verifiers: what tells a neutral difference from a divergent one. Pure functions."""

import re
from dataclasses import dataclass
from typing import Literal

from labeling.continue_ import Fork
from labeling.schema import Label

Note = Literal["", "unanswered", "no_reference", "unparsable", "disagreement"]

_VERDICT = re.compile(r"\W*(same|different)\W*", re.IGNORECASE)

_INSTRUCTIONS = """\
Two writers solve the same problem. They have written the same text so far, and now go on \
differently; the first word that differs stands in <<double angle brackets>>.

Decide whether the difference matters. It matters if it changes the meaning, a fact, a number, a \
name, the line of reasoning, the plan or the result. It does not matter if it is wording, \
spelling, punctuation or layout.

Problem:
{question}

Text so far:
{context}

Writer A goes on:
{first}

Writer B goes on:
{second}

Answer with one word: SAME if the difference does not matter, DIFFERENT if it does."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A label and what is to be counted beside it; UNLABELED where nothing may be said."""

    label: Label
    note: Note = ""


def by_answer(fork: Fork) -> Verdict:
    """Neutral if both ways reach the same final answer; a way that reaches none does not."""
    if fork.llm.answer is None:
        return Verdict(Label.UNLABELED, "no_reference")
    if fork.slm.answer is None:
        return Verdict(Label.DIVERGENT, "unanswered")
    same = fork.slm.answer == fork.llm.answer
    return Verdict(Label.NEUTRAL if same else Label.DIVERGENT)


def by_difference(fork: Fork) -> Verdict:
    """Every difference is divergent: the ablation."""
    return Verdict(Label.DIVERGENT)


def by_verdicts(answers: list[str]) -> Verdict:
    """What a judge's answers say: all must be verdicts, and the same one."""
    verdicts = [parse_verdict(answer) for answer in answers]
    if None in verdicts:
        return Verdict(Label.UNLABELED, "unparsable")
    if len(set(verdicts)) > 1:
        return Verdict(Label.UNLABELED, "disagreement")
    return Verdict(Label.NEUTRAL if verdicts[0] == "same" else Label.DIVERGENT)


def parse_verdict(answer: str) -> str | None:
    """`same` or `different` if a judge said nothing else after its thinking; None otherwise."""
    match = _VERDICT.fullmatch(answer.rpartition("</think>")[2])
    return match[1].lower() if match else None


def judge_prompts(
    fork: Fork, question: str, before: str, *, both_orders: bool, context_chars: int
) -> list[str]:
    """What a judge is asked about a fork: once, or in both orders.

    Args:
        before: the answer's text up to the fork.
    """
    head = before.removesuffix(fork.lead)
    context = ("…" if len(head) > context_chars else "") + head[-context_chars or len(head) :]
    llm, slm = (fork.lead + _marked(branch.text) for branch in (fork.llm, fork.slm))
    orders = [(llm, slm), (slm, llm)] if both_orders else [(llm, slm)]
    return [
        _INSTRUCTIONS.format(
            question=question, context=context or "(nothing)", first=first, second=second
        )
        for first, second in orders
    ]


def _marked(text: str) -> str:
    """The text with its first word in double angle brackets."""
    match = re.match(r"(\s*)(\S+)", text)
    return f"{match[1]}<<{match[2]}>>{text[match.end() :]}" if match else f"<<{text}>>"
