"""A small labeled dataset with a signal to learn, from the rows of a tiny SLM that is on disk."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from labeling.schema import labeled_dataset, observation_columns
from r2r_glimp.models.pair import LoadedModel, ModelPair
from r2r_glimp.routing.features import FeatureSpec, observe
from r2r_glimp.routing.signals import Signals
from tests.tiny import make_tiny_model

NUM_QUESTIONS, NUM_POSITIONS, STEP = 48, 40, 5
TOP_K = 16


@dataclass
class World:
    """The SLM, its rows as the engine has them, and the dataset that labeling would write."""

    slm: LoadedModel
    signals: Signals
    columns: dict
    path: str


def make_slm(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LoadedModel:
    model: PreTrainedModel = make_tiny_model("qwen3", tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelPair.from_pretrained(str(folder), str(folder), device="cpu", dtype="float32").slm


@torch.inference_mode()
def signals_of(slm: LoadedModel) -> Signals:
    """One row per position of random responses."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (NUM_QUESTIONS, NUM_POSITIONS), generator=generator)
    output = slm.model(tokens, output_hidden_states=True)
    logits_NV = output.logits.flatten(0, 1)
    positions = list(range(NUM_POSITIONS)) * NUM_QUESTIONS
    return Signals(
        output.hidden_states[-1].flatten(0, 1), logits_NV, logits_NV.argmax(-1), positions, []
    )


def columns_of(signals: Signals, hidden_size: int) -> dict:
    """Labels that a router can learn: divergent where a direction of the hidden state is large."""
    spec = FeatureSpec(hidden_size=hidden_size, top_k_logits=TOP_K)
    columns = observation_columns(observe(signals, spec))
    num_rows = len(signals.positions)
    rng = np.random.default_rng(0)
    direction = rng.normal(size=hidden_size)
    score = signals.hidden_NH.numpy() @ direction + rng.normal(size=num_rows)
    high, higher = np.quantile(score, [0.75, 0.85])
    label = (score > high).astype(np.int8) + (score > higher)
    step_start = np.array(signals.positions) % STEP == 0
    question = np.repeat(np.arange(NUM_QUESTIONS), NUM_POSITIONS)
    return columns | {
        "question_id": [f"q{i}" for i in question],
        "response_id": [f"q{i}-r0" for i in question],
        "source": ["llm"] * num_rows,
        "position": np.array(signals.positions, np.int32),
        "phase": np.zeros(num_rows, np.int8),
        "step_start": step_start,
        "token": columns["slm_token"],
        "label": label.astype(np.int8),
        "step_label": np.where(step_start, label, -1).astype(np.int8),
    }


def write(columns: dict, folder: Path, slm: LoadedModel | None = None) -> str:
    labeled_dataset(columns).save_to_disk(folder, num_shards=2)
    if slm is not None:
        fingerprint = slm.fingerprint.to_dict()
        (folder / "info.json").write_text(json.dumps({"slm": fingerprint, "llm": fingerprint}))
    return str(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer) -> World:
    folder = tmp_path_factory.mktemp("world")
    slm = make_slm(folder / "slm", tokenizer)
    signals = signals_of(slm)
    columns = columns_of(signals, slm.fingerprint.hidden_size)
    return World(slm, signals, columns, write(columns, folder / "data", slm))


@pytest.fixture
def write_dataset(tmp_path):
    """`write_dataset(columns, slm=None)`: the folder of a dataset, new at each call."""
    count = iter(range(100))
    return lambda columns, slm=None: write(columns, tmp_path / f"data{next(count)}", slm)
