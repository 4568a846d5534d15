"""Abacus word problems: quantities that depend on each other, counted by their last digit.

In the spirit of iGSM (arXiv 2407.20311): a few quantities are given, others are defined from
earlier ones, some definitions are distractors, and one quantity is asked for. A solution visits the
needed definitions in order:

    Say hats 4, keys 2.                       <think>
    Cups: hats + 3.                           Cups: hats 4 + 3 = 7, so cups 7.
    Maps: keys * 9.           ──solve──▶
    Pens: cups * keys.                        Pens: cups 7 * keys 2 gives 4, thus pens 4.
    How many pens?
                                              </think>

                                              Answer 4.

Which definition comes next is the decision that matters; the wording inside a step is free, so two
correct writers often differ in words that change nothing. Knows nothing about models or tokens.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NAMES = (
    "bags bells books cats cups drums fans hats jars keys lamps maps nuts pens rings shoes"
).split()
OPERATORS = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
    "*": lambda a, b: (a * b) % 10,
}

# Words that may stand for each other inside a step: writers differ here and nothing changes.
RESULTS = ("=", "gives", "makes")
CONNECTIVES = ("so", "hence", "thus")

LEVELS = (1, 2, 3, 4, 5)
"""Difficulty: level `n` has `n` to `n + 2` definitions, of which at most two are distractors."""

Split = Literal["train", "validation", "test"]
_ANSWER = re.compile(r"Answer (\d)\b")


@dataclass(frozen=True, slots=True)
class Formula:
    """`name` is `left operator right`; an operand is a quantity's name or a digit."""

    name: str
    left: str
    operator: str
    right: str

    @property
    def operands(self) -> tuple[str, str]:
        return self.left, self.right


@dataclass(frozen=True, slots=True)
class Problem:
    """Given quantities, definitions in an order in which they can be computed, and the name asked
    for."""

    givens: tuple[tuple[str, int], ...]
    formulas: tuple[Formula, ...]
    question: str

    @property
    def needed(self) -> tuple[Formula, ...]:
        """The definitions the asked quantity depends on, in the order of the prompt."""
        wanted, needed = {self.question}, []
        for formula in reversed(self.formulas):
            if formula.name in wanted:
                wanted.update(formula.operands)
                needed.append(formula)
        return tuple(reversed(needed))

    @property
    def level(self) -> int:
        return len(self.needed)

    @property
    def answer(self) -> int:
        return self.values()[self.question]

    def values(self) -> dict[str, int]:
        """Last digit of every quantity."""
        values = dict(self.givens)
        for formula in self.formulas:
            left, right = (int(x) if x.isdigit() else values[x] for x in formula.operands)
            values[formula.name] = OPERATORS[formula.operator](left, right)
        return values

    def prompt(self) -> str:
        """The problem as a user would write it."""
        givens = ", ".join(f"{name} {value}" for name, value in self.givens)
        lines = [f"Say {givens}."]
        lines += [f"{f.name.capitalize()}: {f.left} {f.operator} {f.right}." for f in self.formulas]
        return "\n".join([*lines, f"How many {self.question}?"])

    def solution(self, rng: random.Random) -> str:
        """A correct continuation of `<think>\\n`, its wording drawn from `rng`."""
        values = self.values()

        def operand(name: str) -> str:
            return name if name.isdigit() else f"{name} {values[name]}"

        steps = [
            f"{f.name.capitalize()}: {operand(f.left)} {f.operator} {operand(f.right)} "
            f"{rng.choice(RESULTS)} {values[f.name]}, "
            f"{rng.choice(CONNECTIVES)} {f.name} {values[f.name]}.\n\n"
            for f in self.needed
        ]
        return "".join(steps) + f"</think>\n\nAnswer {self.answer}."

    def recital(self, rng: random.Random) -> tuple[str, str]:
        """An exercise: a prompt that asks for the definitions in some order, and just those."""
        formulas = rng.sample(self.formulas, len(self.formulas))
        names = ", ".join(f.name for f in formulas)
        prompt = f"{self.prompt().rpartition(chr(10))[0]}\nRecite {names}."
        lines = [f"{f.name.capitalize()}: {f.left} {f.operator} {f.right}.\n\n" for f in formulas]
        return prompt, "".join(lines) + "</think>"

    def split(self) -> Split:
        """Where the problem belongs. A hash of its text decides, so no problem is ever in two
        splits."""
        bucket = hashlib.blake2b(self.prompt().encode(), digest_size=1).digest()[0] % 16
        return "train" if bucket < 12 else "validation" if bucket < 14 else "test"


def make_problem(rng: random.Random, level: int) -> Problem:
    """A random problem that needs exactly `level` of its definitions."""
    while True:
        names = rng.sample(NAMES, len(NAMES))
        givens = tuple((names.pop(), rng.randrange(10)) for _ in range(rng.randint(2, 3)))
        known, formulas = [name for name, _ in givens], []
        for _ in range(level + rng.randint(0, 2)):
            # Recent quantities are likelier operands, which makes chains rather than bushes.
            left = known[-1] if rng.random() < 0.5 else rng.choice(known)
            right = rng.choice(known) if rng.random() < 0.5 else str(rng.randrange(10))
            formulas.append(Formula(names.pop(), left, rng.choice(tuple(OPERATORS)), right))
            known.append(formulas[-1].name)
        problem = Problem(givens, tuple(formulas), rng.choice(formulas).name)
        if problem.level == level:
            return problem


def problems(split: Split, seed: int = 0, levels: tuple[int, ...] = LEVELS) -> Iterator[Problem]:
    """Endless distinct-by-split problems, difficulty cycling through `levels`; same seed, same
    problems."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        for level in levels:
            problem = make_problem(rng, level)
            while problem.split() != split:
                problem = make_problem(rng, level)
            yield problem


def extract_answer(text: str) -> int | None:
    """The digit of the last `Answer d` after the thinking, None where there is none."""
    found = _ANSWER.findall(text.rpartition("</think>")[2])
    return int(found[-1]) if found else None


def is_correct(problem: Problem, text: str) -> bool:
    return extract_answer(text) == problem.answer
