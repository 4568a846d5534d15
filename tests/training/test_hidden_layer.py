"""A router that looks at another layer than the last: labeled, trained and served alike."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from labeling.config import LabelingConfig
from labeling.run import run
from labeling.sections import BranchConfig, EngineConfig, ResponseConfig, SourceConfig
from r2r_glimp.core import CheckpointError, RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.hub import load_router
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.features import FeatureSpec, observe
from r2r_glimp.routing.signals import Signals
from training.fit import main

LAYER = 2


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "run"
    config = LabelingConfig(
        out=str(out),
        dtype="float32",
        hidden_layer=LAYER,
        source=SourceConfig(count=20, levels=[3, 4]),
        responses=ResponseConfig(max_tokens=160),
        branches=BranchConfig(max_tokens=160),
        engine=EngineConfig(kv_memory="64MiB", max_batch=32),
    )
    run(config)
    return out / "dataset"


def test_rows_hold_what_transformers_computes(labels: Path) -> None:
    pair = ModelPair.from_config("abacus", device="cpu", dtype="float32")
    rows = datasets.load_from_disk(str(labels)).with_format("numpy")
    first = [row for row in rows if row["response_id"] == rows[0]["response_id"]]
    question = next(iter(SourceQuestions())).prompt
    prompt = pair.slm.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    tokens = [*prompt, *(int(row["token"]) for row in first)]
    with torch.no_grad():
        output = pair.slm.model(torch.tensor([tokens]), output_hidden_states=True)
    wanted = output.hidden_states[LAYER][0, len(prompt) - 1 : -1]
    bits = torch.from_numpy(np.stack([row["hidden"] for row in first]).astype(np.uint16))
    torch.testing.assert_close(bits.view(torch.bfloat16).float(), wanted, rtol=0.02, atol=0.02)
    assert not torch.allclose(wanted, output.hidden_states[-1][0, len(prompt) - 1 : -1], atol=0.1)


class SourceQuestions:
    """The questions that were labeled."""

    def __iter__(self):
        from labeling.sources import load_questions

        return iter(load_questions(SourceConfig(count=20, levels=[3, 4])))


def test_the_router_remembers_its_layer_and_is_served_it(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "router"
    argv = ["--config", "configs/training/abacus-token.yaml", "--data.path", str(labels)]
    argv += ["--data.positive", "different", "--export_dir", str(out)]
    argv += ["--trainer.default_root_dir", str(tmp_path / "runs")]
    assert main([*argv, "--wandb", "off", "--trainer.max_epochs", "1"]) == 0
    router = load_router(out)
    assert router.hidden_layer == LAYER
    engine = Engine(
        ModelPair.from_config("abacus", device="cpu", dtype="float32"), kv_memory="16MiB"
    )
    routing = RoutingParams(router=router, threshold=0.5)
    prompt = [{"role": "user", "content": next(iter(SourceQuestions())).prompt}]
    output = engine.generate([prompt], SamplingParams(max_tokens=60), routing)[0]
    assert output.stats.decisions == len(output.token_ids) > 20
    router.hidden_layer = 9
    with pytest.raises(CheckpointError, match="hidden_layer=9 is wanted, but .* has 3 layers"):
        engine.generate([prompt], SamplingParams(max_tokens=4), routing)


def test_a_layer_that_was_not_kept_is_named() -> None:
    signals = Signals(torch.zeros(1, 8), torch.zeros(1, 16), torch.zeros(1).long(), [0], [0.5])
    spec = FeatureSpec(hidden_size=8, top_k_logits=4, hidden_layer=1)
    with pytest.raises(UsageError, match="layer 1 was not kept"):
        observe(signals, spec)
    with pytest.raises(UsageError, match="hidden_layer=0 is out of range"):
        FeatureSpec(hidden_size=8, hidden_layer=0)
