"""Abacus word problems: quantities that depend on each other, counted by their last digit.

In the spirit of iGSM (arXiv 2407.20311): a few quantities are given, others are defined from
earlier ones, and the last is asked for. A solution goes through the definitions in order:

    Say hats 4, keys 2.                       <think>
    Sum cups: hats and 3.                     Sum cups: hats 4 and 3 = 7, so cups 7.
    Product pens: cups and keys.  ──solve──▶  Product pens: cups 7 and keys 2 gives 4, thus pens 4.
    How many pens?                            </think>

                                              Answer 4.

What an operation gives is the decision that matters; the wording inside a step is free, so two
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
OPERATIONS = {
    "Sum": lambda a, b: (a + b) % 10,
    "Difference": lambda a, b: (a - b) % 10,
    "Product": lambda a, b: (a * b) % 10,
}

# Words that may stand for each other inside a step: writers differ here and nothing changes.
RESULTS = ("=", "gives", "makes")
CONNECTIVES = ("so", "hence", "thus")

LEVELS = (1, 2, 3, 4, 5)
"""Difficulty: how many definitions a problem has."""

Split = Literal["train", "validation", "test"]
_ANSWER = re.compile(r"Answer (\d)\b")


@dataclass(frozen=True, slots=True)
class Formula:
    """`name` is the `operation` of `left` and `right`, each a quantity's name or a digit."""

    operation: str
    name: str
    left: str
    right: str

    @property
    def operands(self) -> tuple[str, str]:
        return self.left, self.right


@dataclass(frozen=True, slots=True)
class Problem:
    """Given quantities, and definitions in an order in which they can be computed."""

    givens: tuple[tuple[str, int], ...]
    formulas: tuple[Formula, ...]

    @property
    def level(self) -> int:
        return len(self.formulas)

    @property
    def answer(self) -> int:
        return self.values()[self.formulas[-1].name]

    def values(self) -> dict[str, int]:
        """Last digit of every quantity."""
        values = dict(self.givens)
        for formula in self.formulas:
            values[formula.name] = OPERATIONS[formula.operation](*_numbers(formula, values))
        return values

    def hardest_product(self) -> int:
        """The largest `n` for which there is a product of two numbers of at least `n`."""
        values = self.values()
        factors = [min(_numbers(f, values)) for f in self.formulas if f.operation == "Product"]
        return max(factors, default=0)

    def prompt(self) -> str:
        """The problem as a user would write it."""
        givens = ", ".join(f"{name} {value}" for name, value in self.givens)
        lines = [f"Say {givens}."]
        lines += [f"{f.operation} {f.name}: {f.left} and {f.right}." for f in self.formulas]
        return "\n".join([*lines, f"How many {self.formulas[-1].name}?"])

    def solution(self, rng: random.Random) -> str:
        """A correct continuation of `<think>\\n`, its wording drawn from `rng`."""
        values = self.values()

        def operand(name: str) -> str:
            return name if name.isdigit() else f"{name} {values[name]}"

        steps = [
            f"{f.operation} {f.name}: {operand(f.left)} and {operand(f.right)} "
            f"{rng.choice(RESULTS)} {values[f.name]}, "
            f"{rng.choice(CONNECTIVES)} {f.name} {values[f.name]}.\n\n"
            for f in self.formulas
        ]
        return "".join(steps) + f"</think>\n\nAnswer {self.answer}."

    def recital(self, rng: random.Random) -> tuple[str, str]:
        """An exercise: a prompt that asks for the definitions in some order, and just those."""
        formulas = rng.sample(self.formulas, len(self.formulas))
        names = ", ".join(f.name for f in formulas)
        prompt = f"{self.prompt().rpartition(chr(10))[0]}\nRecite {names}."
        lines = [f"{f.operation} {f.name}: {f.left} and {f.right}.\n\n" for f in formulas]
        return prompt, "".join(lines) + "</think>"

    def split(self) -> Split:
        """Where the problem belongs. A hash of its text decides, so no problem is ever in two
        splits."""
        bucket = hashlib.blake2b(self.prompt().encode(), digest_size=1).digest()[0] % 16
        return "train" if bucket < 12 else "validation" if bucket < 14 else "test"


def _numbers(formula: Formula, values: dict[str, int]) -> tuple[int, int]:
    left, right = (int(x) if x.isdigit() else values[x] for x in formula.operands)
    return left, right


def make_problem(rng: random.Random, level: int) -> Problem:
    """A random problem of `level` definitions, each of which builds on the one before."""
    names = rng.sample(NAMES, len(NAMES))
    givens = tuple((names.pop(), rng.randrange(10)) for _ in range(rng.randint(2, 3)))
    known, formulas = [name for name, _ in givens], []
    for _ in range(level):
        right = rng.choice(known) if rng.random() < 0.5 else str(rng.randrange(10))
        formulas.append(Formula(rng.choice(tuple(OPERATIONS)), names.pop(), known[-1], right))
        known.append(formulas[-1].name)
    return Problem(givens, tuple(formulas))


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
