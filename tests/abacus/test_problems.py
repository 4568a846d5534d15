"""The abacus world: problems that are what they say, and a scorer that cannot be fooled."""

import random
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from r2r_glimp.abacus.problems import (
    LEVELS,
    Formula,
    Problem,
    extract_answer,
    is_correct,
    make_problem,
    problems,
)

PROBLEM = Problem(
    givens=(("hats", 4), ("keys", 2)),
    formulas=(
        Formula("Sum", "cups", "hats", "3"),
        Formula("Product", "pens", "cups", "keys"),
    ),
)


def test_a_problem_reads_as_the_docs_say() -> None:
    assert PROBLEM.prompt() == (
        "Say hats 4, keys 2.\nSum cups: hats and 3.\nProduct pens: cups and keys.\nHow many pens?"
    )
    assert PROBLEM.answer == 4  # (4 + 3) * 2 = 14
    solution = PROBLEM.solution(random.Random(0))
    assert solution.startswith("Sum cups: hats 4 and 3 ")
    assert solution.endswith("</think>\n\nAnswer 4.")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(LEVELS))
def test_problems_have_the_level_they_were_asked_for(seed: int, level: int) -> None:
    problem = make_problem(random.Random(seed), level)
    assert problem.level == level
    known = [name for name, _ in problem.givens]
    for formula in problem.formulas:
        assert formula.left == known[-1]  # no definition is a distractor
        assert formula.right.isdigit() or formula.right in known
        known.append(formula.name)
    assert is_correct(problem, problem.solution(random.Random(seed)))


def test_the_hardest_product() -> None:
    assert PROBLEM.hardest_product() == 2  # of 7 and 2
    no_product = replace(PROBLEM, formulas=PROBLEM.formulas[:1])
    assert no_product.hardest_product() == 0


def test_wording_varies_and_the_answer_does_not() -> None:
    solutions = {PROBLEM.solution(random.Random(i)) for i in range(50)}
    assert len(solutions) > 20
    assert all(is_correct(PROBLEM, s) for s in solutions)


def test_splits_are_disjoint_and_reproducible() -> None:
    texts = {
        split: {p.prompt() for p in islice(problems(split, seed=seed), 300)}  # type: ignore[arg-type]
        for split in ("train", "validation", "test")
        for seed in (0,)
    }
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    assert list(islice(problems("test"), 20)) == list(islice(problems("test"), 20))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("</think>\n\nAnswer 4.", 4),
        ("Answer 3.</think>\n\nAnswer 4.", 4),
        ("Answer 3.\n\n</think>\n\n", None),
        ("Answer 4.", 4),
        ("</think>Answer 44.", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: int | None) -> None:
    assert extract_answer(text) == answer


def test_every_abacus_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Sum cups: hats 4 and 3 = 7, so cups 7.\n\n")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == [
        "Sum", " cups:", " hats", " 4", " and", " 3", " =", " 7",
        ",", " so", " cups", " 7", ".\n\n",
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_the_template_opens_the_thinking_and_drops_old_ones(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Old thoughts.\n\n</think>\n\nAnswer 1."},
        {"role": "user", "content": "Again"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nAnswer 1.<|im_end|>\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
