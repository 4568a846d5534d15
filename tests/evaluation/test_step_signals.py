"""H_init, H_step and PPL_step of recorded steps: known values, and the bundled pair."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from r2r_glimp.core import DataError
from r2r_glimp.evaluation.step_signals import StepSignals, read_steps, summarise_signals, to_text


def record(*tokens: tuple[str, float, bool], answer: str = "Answer.") -> dict[str, Any]:
    """Tokens of the thinking with their entropies, and whether the LLM would write them too."""
    texts = [text for text, _, _ in tokens]
    trace = [
        {
            "position": i, "source": "slm", "token": i, "score": entropy,
            "llm_token": i if same else -1, "phase": "thinking",
        }
        for i, (_, entropy, same) in enumerate(tokens)
    ]  # fmt: skip
    logprobs = [{"token": i, "logprob": -entropy} for i, (_, entropy, _) in enumerate(tokens)]
    trace.append(
        {"position": len(texts), "source": "llm", "token": 9, "score": None, "phase": "answer"}
    )
    return {
        "id": "a",
        "trace": trace,
        "token_texts": [*texts, answer],
        "logprobs": [*logprobs, {"token": 9, "logprob": 0.0}],
    }


def test_signals_of_known_steps() -> None:
    steps = read_steps(
        [
            record(
                ("<think>", 9.0, True),
                ("\n", 9.0, True),
                ("Sum", 1.0, True),
                (" it", 3.0, False),
                (".\n\n", 2.0, True),
                ("So", 0.5, True),
                ("\n", 0.5, True),
                ("\n", 0.5, True),
                ("</think>", 7.0, True),
            )
        ]
    )
    assert [step.text for step in steps] == ["Sum it.", "So"]
    first, second = steps
    assert (first.h_init, first.h_step) == (1.0, 2.0)
    assert first.ppl_step == pytest.approx(math.exp(2.0))
    assert first.agreement == pytest.approx(2 / 3)
    assert (second.h_init, second.h_step, second.agreement) == (0.5, 0.5, 1.0)


def test_a_signal_that_knows_and_one_that_does_not() -> None:
    steps = [
        StepSignals(
            "", h_init=float(i >= 80) + i / 1e6, h_step=float(i % 7), ppl_step=1.0,
            agreement=0.5 if i >= 80 else 1.0,
        )
        for i in range(100)
    ]  # fmt: skip
    knows, guesses, constant = summarise_signals(steps)
    assert knows.auroc == 1.0 and knows.caught == (0.5, 1.0, 1.0) and knows.correlation < -0.6
    assert knows.bimodality > 0.9 > guesses.bimodality
    assert guesses.auroc == pytest.approx(0.5, abs=0.15)
    assert constant.auroc == 0.5 and constant.correlation == 0 and constant.bimodality == 0
    assert "otherwise (20.0%)" in to_text(steps, [knows, guesses, constant])


@pytest.mark.parametrize("missing", ["trace", "logprobs", "token_texts"])
def test_what_was_not_recorded_is_said(missing: str) -> None:
    row = record(("a.\n\n", 1.0, True))
    del row[missing]
    with pytest.raises(DataError, match="output a: no trace with logprobs: record it with"):
        read_steps([row])


def test_steps_that_the_llm_never_read_are_none() -> None:
    row = record(("a.\n\n", 1.0, True))
    row["trace"][0]["llm_token"] = None
    with pytest.raises(DataError, match="no output has a step"):
        read_steps([row])


def test_a_recording_of_the_bundled_pair(cli: Any, tmp_path: Path) -> None:
    questions, trace = tmp_path / "q.jsonl", tmp_path / "trace.jsonl"
    prompt = "Say hats 4.\nProduct cups: hats and 3.\nSum pens: cups and 1.\nHow many pens?"
    questions.write_text(json.dumps({"id": "a", "prompt": prompt}) + "\n")
    argv = "--router entropy --granularity token --threshold 100 --answer_by llm --trace"
    result = cli("generate", "--file", questions, *argv.split(), "--logprobs", "0",
                 "--output", trace, "--kv_memory", "16MiB")  # fmt: skip
    assert result.code == 0, result.err
    facts = json.loads(cli("inspect", trace, "--signals", "--json").out)
    assert facts["signals"]["steps"] == 2
    assert [row["name"] for row in facts["signals"]["rows"]] == ["H_init", "H_step", "PPL_step"]
    assert "H_step" in cli("inspect", trace, "--signals").out
    assert "no JSONL file" in cli("inspect", "abacus", "--signals").error
