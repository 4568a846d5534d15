"""Labels against a plain Hugging Face loop, and what each configuration changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from labeling.answers import final_abacus
from labeling.config import LabelingConfig
from labeling.reference import PlainLabeler
from labeling.run import run
from labeling.schema import Label, Phase
from labeling.sections import (
    BranchConfig,
    DrawConfig,
    EngineConfig,
    JudgeConfig,
    ResponseConfig,
    SourceConfig,
    VerifierConfig,
)
from labeling.shards import plan
from labeling.sources import load_questions
from labeling.worker import Worker
from r2r_glimp.core import CheckpointError, DataError, EngineError, UsageError
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.signals import entropy_nats
from tests.labeling.conftest import read

Labeling = Callable[..., dict[tuple[str, int], dict[str, Any]]]
MakeConfig = Callable[..., LabelingConfig]
IDENTICAL = VerifierConfig(kind="identical")


@pytest.fixture(scope="module")
def plain(plain_pair: ModelPair) -> dict[tuple[str, int], tuple[int, int, int, int]]:
    """Token, candidate, label and step label at each position, the plain way."""
    labeler = PlainLabeler(
        plain_pair.slm.model,
        plain_pair.llm.model,
        plain_pair.slm.tokenizer,
        final_abacus,
        max_tokens=160,
    )
    rows = {}
    source = SourceConfig(count=6, split="validation", levels=[2, 3])
    for question in load_questions(source):
        one = labeler.label(question.prompt)
        assert one is not None
        columns = zip(one.tokens, one.candidates, one.labels, one.step_labels, strict=True)
        rows |= {(f"{question.id}/0", p): row for p, row in enumerate(columns)}
    return rows


def narrow(rows: dict[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, int], tuple]:
    names = ("token", "slm_token", "label", "step_label")
    return {key: tuple(row[name] for name in names) for key, row in rows.items()}


@pytest.mark.parametrize(
    "engine",
    [
        EngineConfig(kv_memory="64MiB", max_batch=32),
        EngineConfig(kv_memory="64MiB", max_batch=5, max_batch_tokens=40, draft=9),
        EngineConfig(kv_memory="64MiB", max_batch=32, draft=0),
        # room for about two texts: branches wait, and are preempted
        EngineConfig(kv_memory="700KiB", max_batch=8, max_batch_tokens=64),
    ],
    ids=["as shipped", "small passes", "no draft", "little memory"],
)
def test_labels_are_those_of_a_plain_loop(
    label: Labeling, plain: dict, engine: EngineConfig
) -> None:
    rows = narrow(label(engine=engine))
    assert rows == plain
    found = {Label(row[2]) for row in rows.values()}
    assert found == {Label.IDENTICAL, Label.NEUTRAL, Label.DIVERGENT}
    assert {row[3] for row in rows.values()} >= {-1, 0, 1}


def test_rows_hold_what_the_slm_sees(label: Labeling, plain_pair: ModelPair) -> None:
    rows = label(granularity="token", verifier=IDENTICAL)
    question = load_questions(SourceConfig(count=6, split="validation", levels=[2, 3]))[0]
    tokenizer, model = plain_pair.slm.tokenizer, plain_pair.slm.model
    message = [{"role": "user", "content": question.prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    mine = [row for (id, _), row in rows.items() if id == f"{question.id}/0"]
    tokens = [row["token"] for row in mine]
    with torch.inference_mode():
        out = model(torch.tensor([prompt + tokens]), output_hidden_states=True)
    wanted = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    logits = out.logits[0, wanted]
    bits = torch.tensor([row["hidden"] for row in mine], dtype=torch.int32).to(torch.uint16)
    hidden = out.hidden_states[-1][0, wanted]
    torch.testing.assert_close(
        bits.view(torch.bfloat16).float(), hidden.bfloat16().float(), atol=1e-2, rtol=1e-2
    )
    top = np.array([row["top_logits"] for row in mine])
    np.testing.assert_allclose(top, logits.topk(32).values.numpy(), atol=1e-4)
    entropy = [row["entropy"] for row in mine]
    np.testing.assert_allclose(entropy, entropy_nats(logits).numpy(), atol=1e-4)


def test_phases_and_step_starts(label: Labeling, pair: ModelPair) -> None:
    rows = label(verifier=IDENTICAL)
    close = pair.slm.tokenizer.convert_tokens_to_ids("</think>")
    for (id, position), row in rows.items():
        before = rows.get((id, position - 1))
        answers = before is not None and (before["phase"] == 1 or before["token"] == close)
        assert row["phase"] == (Phase.ANSWER if answers else Phase.THINKING)
        text = pair.slm.tokenizer.decode([before["token"]]) if before else "\n\n"
        assert row["step_start"] == (text.endswith("\n\n") and row["phase"] == Phase.THINKING)
        assert (row["step_label"] == Label.UNLABELED) != row["step_start"]


def test_an_on_policy_round_compares_with_the_llm(label: Labeling, plain_pair: ModelPair) -> None:
    rows = label(responses=ResponseConfig(by="pair", router="random", max_tokens=160))
    question = load_questions(SourceConfig(count=6, split="validation", levels=[2, 3]))[0]
    tokenizer = plain_pair.slm.tokenizer
    message = [{"role": "user", "content": question.prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    mine = {p: row for (id, p), row in rows.items() if id == f"{question.id}/0"}
    tokens = [mine[p]["token"] for p in range(len(mine))]
    with torch.inference_mode():
        logits = plain_pair.llm.model(torch.tensor([prompt + tokens])).logits[0]
    choices = logits.argmax(-1).tolist()[len(prompt) - 1 :]
    for p, row in mine.items():
        assert (row["label"] == Label.IDENTICAL) == (row["slm_token"] == choices[p])
    assert {row["label"] for row in rows.values()} == {0, 1, 2}
    # Most of what the pair wrote is the SLM's own: no mismatch with the text, but with the LLM.
    assert any(r["slm_token"] == r["token"] and r["label"] > 0 for r in rows.values())


def test_an_on_policy_round_with_free_labels(label: Labeling) -> None:
    responses = ResponseConfig(by="pair", router="random", max_tokens=160, threshold=0.5)
    checked = label(responses=responses, granularity="token")
    free = label(responses=responses, granularity="token", verifier=IDENTICAL, overwrite=True)
    assert 0.5 * len(checked) < len(free) <= len(checked)
    for key, row in free.items():
        assert row["label"] == (Label.DIVERGENT if checked[key]["label"] else Label.IDENTICAL)


def test_identical_is_the_ablation(label: Labeling, plain: dict) -> None:
    rows = narrow(label(verifier=IDENTICAL))
    for key, (token, candidate, token_label, step_label) in rows.items():
        assert token_label == (0 if token == candidate else 2)
        assert step_label == {-1: -1, 0: 0, 1: 2, 2: 2}[plain[key][3]]


def test_steps_alone_keep_all_rows(label: Labeling, plain: dict) -> None:
    rows = narrow(label(granularity="step"))
    assert rows.keys() == plain.keys()
    assert all(row[2] == Label.UNLABELED for row in rows.values())
    assert all(row[3] == plain[key][3] for key, row in rows.items())


def test_sampled_labels(label: Labeling) -> None:
    sampled: dict[str, Any] = {
        "responses": ResponseConfig(n=2, max_tokens=160, sampling=DrawConfig(temperature=0.9)),
        "candidate": DrawConfig(temperature=1.0, seed=3),
        "verifier": IDENTICAL,
    }
    rows = label(**sampled)
    assert {id.rpartition("/")[2] for id, _ in rows} == {"0", "1"}
    other = sampled | {"candidate": DrawConfig(temperature=1.0, seed=4)}
    again = label(**other, overwrite=True)
    assert [r["token"] for r in rows.values()] == [r["token"] for r in again.values()]
    assert [r["slm_token"] for r in rows.values()] != [r["slm_token"] for r in again.values()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_given_responses(label: Labeling, plain: dict, pair: ModelPair, tmp_path: Path) -> None:
    questions = load_questions(SourceConfig(count=6, split="validation", levels=[2, 3]))
    given = []
    for question in questions:
        tokens = [plain[key][0] for key in sorted(plain) if key[0] == f"{question.id}/0"]
        text = "<think>\n" + pair.slm.tokenizer.decode(tokens[:-1])
        given.append({"id": question.id, "question": question.prompt, "response": text})
    path = write_jsonl(tmp_path / "given.jsonl", given)
    source = SourceConfig(kind="file", path=path, answer="abacus")
    rows = label(source=source, responses=ResponseConfig(by="input"))
    assert narrow(rows) == plain
    assert {row["source"] for row in rows.values()} == {"given"}


def test_the_pairs_own_llm_may_judge(pair: ModelPair, make_config: MakeConfig) -> None:
    # This LLM only knows abacus: what it says is never a verdict, and never taken for one.
    judge = VerifierConfig(kind="judge", judge=JudgeConfig(max_tokens=4))
    until = BranchConfig(until="sentence", max_tokens=40)
    few = SourceConfig(count=8, split="validation", levels=[5])
    config = make_config(verifier=judge, branches=until, source=few)
    with pytest.raises(EngineError, match="gave no verdict on .* differences: it must answer SAME"):
        run(config, pair)
    lenient = VerifierConfig(kind="judge", judge=JudgeConfig(max_tokens=4, max_unparsable=1.0))
    summary = run(replace(config, verifier=lenient), pair)
    assert summary is not None and summary["counts"]["unparsable"] > 10
    rows = read(config.out_dir)
    assert {row["label"] for row in rows.values()} == {Label.IDENTICAL}
    assert len(rows) == summary["counts"]["tokens"] - summary["counts"]["token_forks"]


def test_info_says_what_the_data_is(pair: ModelPair, make_config: MakeConfig) -> None:
    config = make_config()
    run(config, pair)
    info = json.loads((config.out_dir / "info.json").read_bytes())
    beside = json.loads((config.out_dir / "dataset" / "info.json").read_bytes())
    assert info["slm"] == beside["slm"] == pair.slm.fingerprint.to_dict()
    assert info["counts"]["questions"] == 6 and info["counts"]["responses"] == 6
    assert sum(info["labels"].values()) == info["counts"]["rows"] == info["counts"]["tokens"]
    assert set(info["seconds"]) == {"respond", "compare", "continue", "verify", "write"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"responses": ResponseConfig(max_tokens=5)},
            DataError,
            r"none of 6 responses .*6 unfinished \(raise responses.max_tokens\)",
        ),
        (
            {"source": SourceConfig(count=6, answer="boxed")},
            DataError,
            r"none of 6 responses .*without a final answer \(is source.answer right\?\)",
        ),
        (
            {"responses": ResponseConfig(by="input")},
            UsageError,
            "abacus problems come without responses",
        ),
        ({"top_k_logits": 100_000}, UsageError, "top_k_logits=100000, but the vocabulary has"),
        ({"delimiter": "comma"}, UsageError, "unknown delimiter 'comma'"),
        (
            {"responses": ResponseConfig(by="pair", router="/no/such/router")},
            CheckpointError,
            "/no/such/router",
        ),
    ],
)
def test_what_cannot_be_labeled(
    pair: ModelPair,
    make_config: MakeConfig,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as raised:
        run(make_config(**changes), pair)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "Cups are 3."}, "x.jsonl:1: key 'response' never closes its thinking"),
        ({"response": "</think>" + " 7" * 3000}, "x.jsonl:1: prompt and response have 3,"),
        ({"question": "7 " * 3000, "response": "</think>7"}, "x.jsonl:1: the prompt has"),
        ({}, "x.jsonl:1: key 'response' is missing"),
    ],
)
def test_given_responses_that_do_not_fit(
    pair: ModelPair, make_config: MakeConfig, tmp_path: Path, row: dict[str, str], message: str
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"id": "a", "question": "How many?"} | row])
    source = SourceConfig(kind="file", path=path)
    responses = ResponseConfig(by="input")
    with pytest.raises(DataError, match=message):
        run(make_config(source=source, responses=responses, verifier=IDENTICAL), pair)


def test_a_pair_without_think_tags_thinks_all_the_way(
    pair: ModelPair, make_config: MakeConfig
) -> None:
    config = make_config(verifier=IDENTICAL, source=SourceConfig(count=3))
    worker = Worker(config, pair)
    worker.engine.tags = None
    with worker.store.lock(config):
        worker.label(plan(load_questions(config.source), 3)[0], "")
    table = pa.ipc.open_stream(worker.store.path(0).read_bytes()).read_all()
    rows = table.to_pylist()
    assert {row["phase"] for row in rows} == {Phase.THINKING}
    close = pair.slm.tokenizer.convert_tokens_to_ids("</think>")
    tags = [i for i, row in enumerate(rows) if row["token"] == close]
    assert len(tags) == 3 and all(rows[i]["step_start"] for i in tags)


def test_the_pair_may_be_routed_by_steps(label: Labeling) -> None:
    responses = ResponseConfig(by="pair", router="entropy", granularity="step", max_tokens=160)
    rows = label(responses=responses, source=SourceConfig(count=3))
    assert {row["step_label"] for row in rows.values()} >= {-1, 0, 1}


def test_two_tokenizers_are_refused(load: Callable[[], ModelPair], make_config: MakeConfig) -> None:
    from tokenizers import AddedToken

    pair = load()
    pair.llm.tokenizer.add_tokens([AddedToken("<extra>", special=False)])
    with pytest.raises(UsageError, match="labels need a pair with one vocabulary, and"):
        run(make_config(), pair)


def test_nan_weights_are_an_error_that_names_the_row(
    load: Callable[[], ModelPair], make_config: MakeConfig
) -> None:
    pair = load()
    pair.slm.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(EngineError, match=r"problem validation-0-\d.*the SLM failed: .*not finite"):
        run(make_config(verifier=IDENTICAL), pair)
