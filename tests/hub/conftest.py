"""A router checkpoint without a training run, and a Hub on this machine to publish it to."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from r2r_glimp.hub.checkpoint import RouterCheckpoint
from r2r_glimp.hub.config import RouterConfig
from r2r_glimp.models.fingerprint import Fingerprint
from r2r_glimp.routing.drift import Traffic
from r2r_glimp.routing.features import FeatureSpec
from r2r_glimp.routing.mlp import MLPConfig, MLPRouterNet, MLPSize, Threshold
from tests.hub.fake_hub import FakeHub, serve

FINGERPRINT = Fingerprint(
    name_or_path="acme/small",
    architecture="Qwen3ForCausalLM",
    hidden_size=8,
    num_layers=2,
    vocab_size=64,
    tokenizer_sha256="ab" * 32,
    weights_sha256="cd" * 32,
)
MODEL = MLPConfig(
    granularity="token",
    features=FeatureSpec(hidden_size=8, top_k_logits=4),
    size=MLPSize(width=8, blocks=1),
)


@pytest.fixture
def make_checkpoint() -> Callable[..., RouterCheckpoint]:
    def make(seed: int = 0) -> RouterCheckpoint:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tensors = MLPRouterNet(MODEL).state_dict()
        threshold = Threshold(
            value=0.25, calibrated_on="selection split", llm_share=0.1, recall=0.95
        )
        config = RouterConfig(
            model=MODEL,
            thresholds={"recall-0.95": threshold},
            default_threshold="recall-0.95",
            slm=FINGERPRINT,
            llm=FINGERPRINT,
            trained_on={"dataset": "acme/labels", "rows": 100, "command": "python -m training.fit"},
            metrics={"test/ap": 0.5},
        )
        curve = {
            "measured_on": "selection split",
            "threshold": [0.0, 0.5],
            "llm_share": [1.0, 0.1],
            "recall": [1.0, 0.9],
            "precision": [0.05, None],
        }
        traffic = Traffic(
            measured_on="100 questions", threshold=0.25, answer_by="router", num_requests=100,
            cuts=(0.1, 0.5), low=(0.05, 0.3, 0.0), high=(0.15, 0.4, 0.1),
        )  # fmt: skip
        return RouterCheckpoint(config, dict(tensors), curve, "seed_everything: 0\n", traffic)

    return make


@pytest.fixture
def folder(make_checkpoint, tmp_path) -> Path:
    """The checkpoint, saved."""
    make_checkpoint().save_pretrained(tmp_path / "router")
    return tmp_path / "router"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the client talks to instead of the real one."""
    fake = FakeHub()
    with serve(fake) as endpoint:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        download = huggingface_hub.snapshot_download

        def snapshot_download(*args, **kwargs):
            return download(*args, endpoint=endpoint, cache_dir=tmp_path / "cache", **kwargs)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        yield fake
