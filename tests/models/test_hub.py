"""Hub ids: the real client against a Hub on this machine."""

import functools
import json

import huggingface_hub
import pytest
import torch

from r2r_glimp.core import CheckpointError
from r2r_glimp.models import ModelPair
from tests.models.fake_hub import COMMIT, REPO, fake_hub


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """The folder served as `acme/tiny` and the list of files that were asked for."""
    folder = checkpoint()
    for name in ("pytorch_model.bin", "modeling_evil.py", "optimizer.safetensors", "model.onnx"):
        (folder / name).write_bytes(b"not wanted")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with fake_hub(folder) as (endpoint, asked):
        there = functools.partial(
            huggingface_hub.snapshot_download, endpoint=endpoint, cache_dir=tmp_path / "cache"
        )
        monkeypatch.setattr(huggingface_hub, "snapshot_download", there)
        yield folder, asked


def refusal(name: str, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        ModelPair.from_pretrained(name, name, device="cpu", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_load_from_the_hub(hub, tiny_model):
    _, asked = hub
    pair = ModelPair.from_pretrained(REPO, REPO, device="cpu", revision={"slm": "main"})
    prompt = torch.tensor([[5, 6, 7]])
    assert torch.equal(pair.slm.model(prompt).logits, tiny_model()(prompt).logits)
    assert pair.slm.fingerprint.revision == COMMIT
    assert pair.slm.name == REPO
    assert "model.safetensors" in asked and "tokenizer.json" in asked
    unwanted = ("pytorch_model.bin", "modeling_evil.py", "optimizer.safetensors", "model.onnx")
    assert not set(unwanted) & set(asked)


def test_offline_takes_the_cache(hub, monkeypatch):
    ModelPair.from_pretrained(REPO, REPO, device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pair = ModelPair.from_pretrained(REPO, REPO, device="cpu")
    assert pair.slm is pair.llm
    assert pair.slm.fingerprint.revision == COMMIT
    assert "not in the Hub cache" in refusal("acme/other")


def test_what_the_hub_refuses(hub):
    assert "no such repository on the Hub" in refusal("acme/missing")
    assert "acme/gated is gated: ask for access" in refusal("acme/gated")
    assert f"{REPO} has no revision 'v9'" in refusal(REPO, revision="v9")
    assert "acme/down" in refusal("acme/down")
    assert "neither a folder nor a Hub id" in refusal("what a name!")


def test_a_bad_repository_is_refused_like_a_bad_folder(hub):
    folder, _ = hub
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 1 weight files are missing" in refusal(REPO)
