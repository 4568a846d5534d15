"""Fingerprints: stable where nothing changed, different where something did, one line why."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2r_glimp.abacus.tokenizer import build_tokenizer
from r2r_glimp.core import CheckpointError
from r2r_glimp.models import Fingerprint, LoadedModel, ModelPair
from r2r_glimp.models.vocabulary import tokenizer_sha256


@pytest.fixture
def fingerprint(tiny_model, tokenizer) -> Fingerprint:
    return LoadedModel.from_model(
        tiny_model(vocab_size=512), tokenizer, name="acme/small"
    ).fingerprint


def test_what_it_says(fingerprint):
    assert fingerprint.architecture == "Qwen3ForCausalLM"
    assert (fingerprint.hidden_size, fingerprint.num_layers, fingerprint.vocab_size) == (32, 2, 512)
    assert (fingerprint.revision, fingerprint.adapters) == (None, ())


def test_round_trip_through_json(fingerprint):
    there = json.loads(json.dumps(dataclasses.replace(fingerprint, adapters=("a", "b")).to_dict()))
    back = Fingerprint.from_dict(there)
    assert back.adapters == ("a", "b")
    assert dataclasses.replace(back, adapters=()) == fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_layers": True}, "num_layers is True"),
        ({"adapters": "abc"}, "adapters is 'abc'"),
        ({"architecture": None}, "architecture is None"),
        ({"color": "red"}, "has no 'color'"),
    ],
)
def test_what_cannot_be_read(fingerprint, change, words):
    with pytest.raises(CheckpointError, match=words):
        Fingerprint.from_dict(fingerprint.to_dict() | change)


def test_what_is_missing(fingerprint):
    values = fingerprint.to_dict()
    del values["tokenizer_sha256"]
    with pytest.raises(CheckpointError, match="has no tokenizer_sha256"):
        Fingerprint.from_dict(values)
    with pytest.raises(CheckpointError, match="is a mapping, not a list"):
        Fingerprint.from_dict([])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "LlamaForCausalLM"}, "architecture is LlamaForCausalLM, not Qwen3"),
        ({"hidden_size": 64}, "hidden size is 64, not 32"),
        ({"num_layers": 3}, "number of layers is 3, not 2"),
        ({"tokenizer_sha256": "x"}, "the tokenizer differs"),
        ({"weights_sha256": "x"}, "the weights differ"),
        ({"adapters": ("math",)}, "adapters is math, not none"),
    ],
)
def test_mismatch_says_why(fingerprint, change, words):
    other = dataclasses.replace(fingerprint, name_or_path="acme/other", **change)
    reason = fingerprint.mismatch(other)
    assert reason.startswith(words)
    assert reason.endswith("(acme/other in place of acme/small)")


def test_names_and_revisions_may_differ(fingerprint):
    moved = dataclasses.replace(fingerprint, name_or_path="./elsewhere", revision="abc")
    assert fingerprint.mismatch(moved) is None


def test_weights_in_memory(tiny_model, tokenizer, fingerprint):
    again = LoadedModel.from_model(tiny_model(vocab_size=512), tokenizer).fingerprint
    assert fingerprint.mismatch(again) is None
    other = LoadedModel.from_model(tiny_model(seed=1, vocab_size=512), tokenizer).fingerprint
    assert fingerprint.mismatch(other).startswith("the weights differ")


def test_weights_in_files(checkpoint):
    one, copy, other = checkpoint("one"), checkpoint("copy"), checkpoint("other", seed=1)
    prints = [
        ModelPair.from_pretrained(folder, folder, device="cpu", dtype=dtype).slm.fingerprint
        for folder, dtype in ((one, "float32"), (copy, "bfloat16"), (other, "float32"))
    ]
    assert prints[0].mismatch(prints[1]) is None
    assert prints[0].mismatch(prints[2]).startswith("the weights differ")
    tensors = {k: v + 1 for k, v in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    changed = ModelPair.from_pretrained(copy, copy, device="cpu").slm.fingerprint
    assert prints[0].mismatch(changed).startswith("the weights differ")


def test_use_does_not_change_a_tokenizer(tokenizer):
    used = build_tokenizer()
    used(["a", "b c d"], padding=True, truncation=True, max_length=2, return_tensors="pt")
    assert tokenizer_sha256(used) == tokenizer_sha256(tokenizer)
    used.add_tokens(["<tool>"])
    assert tokenizer_sha256(used) != tokenizer_sha256(tokenizer)


def test_shared_weights_count_once(tiny_model, tokenizer):
    tied = LoadedModel.from_model(tiny_model(tie_word_embeddings=True, vocab_size=512), tokenizer)
    free = LoadedModel.from_model(tiny_model(tie_word_embeddings=False, vocab_size=512), tokenizer)
    assert free.num_parameters - tied.num_parameters == 512 * 32
    assert torch.is_floating_point(next(tied.model.parameters()))
