"""A router that looks at another layer than the last: labeled, trained and served alike."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labeling.config import LabelingConfig
from labeling.run import run
from labeling.sections import EngineConfig, ResponseConfig, SourceConfig, VerifierConfig
from labeling.sources import load_questions
from r2r_glimp.core import CheckpointError, Model, RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.prefill import read_rows
from r2r_glimp.hub import load_router
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.features import FeatureSpec, observe
from r2r_glimp.routing.signals import Signals
from training.data import RouterData
from training.fit import main
from training.module import RouterModule
from training.rows import LabeledRows

LAYER = 2
SOURCE = SourceConfig(count=20, levels=[3, 4])
QUESTION = [{"role": "user", "content": load_questions(SOURCE)[0].prompt}]


def config(out: Path, **changes) -> LabelingConfig:
    values = {
        "out": str(out),
        "dtype": "float32",
        "granularity": "token",
        "hidden_layer": LAYER,
        "source": SOURCE,
        "responses": ResponseConfig(max_tokens=160),
        "verifier": VerifierConfig(kind="identical"),
        "engine": EngineConfig(kv_memory="64MiB", max_batch=32),
    }
    return LabelingConfig(**values | changes)


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("labels") / "run"
    run(config(out))
    return str(out / "dataset")


@pytest.fixture(scope="module")
def router(labels, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    argv = ["--config", "configs/training/abacus-token.yaml", "--data.path", labels]
    argv += ["--export_dir", str(folder / "router"), "--wandb", "off"]
    argv += ["--trainer.default_root_dir", str(folder), "--trainer.max_epochs", "1"]
    assert main(argv) == 0
    return folder / "router"


def load(dtype: str = "float32") -> ModelPair:
    return ModelPair.from_config("abacus", device="cpu", dtype=dtype)


def first_text(pair: ModelPair, labels: str) -> tuple[list[int], list[int]]:
    """Prompt and response of the first labeled answer; its rows are the dataset's first."""
    prompt = pair.slm.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    rows = datasets.load_from_disk(labels).select_columns(["response_id", "token"])
    return prompt, [r["token"] for r in rows if r["response_id"] == rows[0]["response_id"]]


def test_rows_hold_what_transformers_computes(labels) -> None:
    pair, rows = load(), LabeledRows(labels)
    prompt, response = first_text(pair, labels)
    with torch.no_grad():
        tokens = torch.tensor([prompt + response[:-1]])
        states = pair.slm.model(tokens, output_hidden_states=True).hidden_states
    spec = FeatureSpec(hidden_size=rows.hidden_size, hidden_layer=LAYER)
    kept = rows.observe(np.arange(len(response)), spec).hidden_NH.float()
    wanted = states[LAYER][0, len(prompt) - 1 :]
    torch.testing.assert_close(kept, wanted, rtol=0.01, atol=0.01)
    assert rows.hidden_layer == LAYER
    assert not torch.allclose(wanted, states[-1][0, len(prompt) - 1 :], atol=0.1)


def test_the_engine_scores_as_the_trainer_did(labels, router) -> None:
    data, module = RouterData(labels), RouterModule()
    data.setup()
    module.prepare(data)
    module.net.load_state_dict(load_file(router / "model.safetensors"))
    module.eval()
    loaded, pair = load_router(router), load()
    assert loaded.hidden_layer == LAYER
    engine = Engine(pair, router=loaded, kv_memory="16MiB")
    prompt, response = first_text(pair, labels)

    # The same rows, as the engine hands them to the router.
    text = (prompt + response[:-1], len(prompt) - 1)
    [(_, rows)] = read_rows(engine, Model.SLM, [text])
    places = list(range(len(response)))
    candidates = rows.logits_RV.argmax(-1)
    signals = Signals(rows.hidden_RH, rows.logits_RV, candidates, places, [0.5] * len(places))
    signals.layers = rows.layers
    features = module.net.config.features
    with torch.no_grad():
        inputs = features.inputs(observe(signals, features), module.embedding_VH)
        trained = module.net(inputs).sigmoid()
    torch.testing.assert_close(loaded.score(signals), trained, atol=1e-5, rtol=0)

    # The rows as they were labeled, and those met while the pair writes that very text.
    with torch.no_grad():
        inputs = features.inputs(data.rows.observe(np.array(places), features), module.embedding_VH)
        labeled = module.net(inputs).sigmoid()
    assert labeled.max() - labeled.min() > 0.2
    routing = RoutingParams(threshold=-1.0, trace=True)  # every token is the LLM's
    output = engine.generate([QUESTION], SamplingParams(max_tokens=160), routing)[0]
    assert output.token_ids == response
    served = torch.tensor([decision.score for decision in output.trace])
    torch.testing.assert_close(served, labeled, atol=0.02, rtol=0)


def test_fast_layers_are_looked_at_like_plain_ones(labels) -> None:
    kept = {}
    for kernels in ("auto", "torch"):
        pair = load("bfloat16")
        engine = Engine(pair, router="slm", kv_memory="16MiB", kernels=kernels)
        engine.runners[Model.SLM].keep_layer(LAYER)
        prompt, response = first_text(pair, labels)
        [(_, rows)] = read_rows(engine, Model.SLM, [(prompt + response, len(prompt))])
        kept[kernels] = rows.layers[LAYER].float()
    scale = kept["torch"].abs().max().item()
    torch.testing.assert_close(kept["auto"], kept["torch"], atol=0.03 * scale, rtol=0)


def test_a_layer_that_is_not_there_is_refused(router, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="hidden_layer=9 is wanted, but .* has 3 layers"):
        run(config(tmp_path / "out", hidden_layer=9), load())
    with pytest.raises(UsageError, match="hidden_layer=0 is out of range"):
        config(tmp_path / "out", hidden_layer=0)
    loaded = load_router(router)
    loaded.hidden_layer = 9
    with pytest.raises(CheckpointError, match="hidden_layer=9 is wanted"):
        Engine(load(), router=loaded, kv_memory="16MiB")
    signals = Signals(torch.zeros(1, 8), torch.zeros(1, 16), torch.zeros(1).long(), [0], [0.5])
    with pytest.raises(UsageError, match="layer 1 was not kept"):
        observe(signals, FeatureSpec(hidden_size=8, top_k_logits=4, hidden_layer=1))
