"""Final answers: how one is found in a text. None where there is none.

Only equality matters here: whether two branches of one text end at the same answer. Whether an
answer is right is the evaluation's business.
"""

import re
from collections.abc import Callable

from labeling.sections import AnswerKind
from r2r_glimp.abacus.problems import extract_answer

Extract = Callable[[str], str | None]

_CHOICE = re.compile(r"(?i:answer)(?i:\s+is)?\W{0,8}([A-Z])\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = "\\boxed{"
_PROGRAM = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def final_abacus(text: str) -> str | None:
    """The digit of the last `Answer d` after the thinking."""
    digit = extract_answer(text)
    return None if digit is None else str(digit)


def final_boxed(text: str) -> str | None:
    """What the last \\boxed{...} after the thinking holds, without white space or leading zeros."""
    text = _after_thinking(text)
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(_BOXED), len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            held = "".join(text[start + len(_BOXED) : end].split())
            return (held.lstrip("0") or "0") if held.isdigit() else held or None
    return None


def final_choice(text: str) -> str | None:
    """The letter of the last `Answer: X` after the thinking, boxed or bare."""
    plain = _after_thinking(text).replace("**", "")
    if found := _CHOICE.findall(plain.replace(_BOXED, "{")):
        return found[-1]
    boxed = final_boxed(plain)
    return boxed if boxed is not None and re.fullmatch(r"[A-Z]", boxed) else None


def final_number(text: str) -> str | None:
    """The last number after the thinking, without thousands separators."""
    found = _NUMBER.findall(_after_thinking(text))
    return found[-1].replace(",", "") if found else None


def final_text(text: str) -> str | None:
    """All that follows the thinking, without white space around it."""
    return _after_thinking(text).strip() or None


def final_code(text: str) -> str | None:
    """The last fenced program after the thinking."""
    found = _PROGRAM.findall(_after_thinking(text))
    return found[-1] if found and found[-1].strip() else None


EXTRACTORS: dict[AnswerKind, Extract] = {
    "abacus": final_abacus,
    "boxed": final_boxed,
    "choice": final_choice,
    "number": final_number,
    "text": final_text,
    "math": final_boxed,
    "code": final_code,
}


def _after_thinking(text: str) -> str:
    return text.rpartition("</think>")[2]
