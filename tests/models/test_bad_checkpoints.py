"""All that can be wrong with a checkpoint's folder: one line says what, where, and what to do."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.models import ModelPair
from r2r_glimp.models.files import read_safetensors_header

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
HTML = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"


def refusal(folder, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        ModelPair.from_pretrained(folder, folder, device="cpu", **options)
    message = str(error.value)
    assert "\n" not in message
    assert "random" not in message
    return message


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Copies, for the file may be written over: what safetensors loads is mapped from it."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_no_folder(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (
        "./nowhere",
        str(tmp_path / "no"),
        "~/no/where",
        "a/b/c",
        "checkpoints/abacus-slm",
    ):
        assert refusal(name) == f"{name}: no such folder"
    (tmp_path / "file").write_text("x")
    assert "is a file: give the folder" in refusal("./file")
    with pytest.raises(UsageError, match="is empty"):
        ModelPair.from_pretrained("", "", device="cpu")


def test_no_config(checkpoint):
    folder = checkpoint()
    (folder / "config.json").unlink()
    assert refusal(folder).endswith("has no config.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b'{"model_type": ', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[]", "holds a list where a JSON object is wanted"),
        (LFS, "git-LFS pointer"),
        (HTML, "web page"),
    ],
)
def test_broken_json(checkpoint, name, content, words):
    folder = checkpoint()
    (folder / name).write_bytes(content)
    message = refusal(folder)
    assert str(folder / name) in message and words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"model_type": "t5"}, "is a t5 model, no causal language model"),
        ({"num_hidden_layers": "two"}, "cannot be used: .*num_hidden_layers"),
        ({"num_hidden_layers": 3}, "cannot be used: .*must be equal to the number"),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            "lacks weights of Qwen3ForCausalLM: .*layers.2.",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": None},
            "weights unknown to Qwen3ForCausalLM: .*layers.1.",
        ),
        ({"hidden_size": 64}, r"does not fit its config: .* is \[.*\], Qwen3ForCausalLM wants"),
        ({"model_type": "llama"}, "weights unknown to LlamaForCausalLM: 4 .*k_norm"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "trust_remote_code"),
    ],
)
def test_config_that_does_not_fit(checkpoint, change, words):
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert re.search(words, refusal(folder))


def test_a_config_cannot_choose_the_attention_code(checkpoint):
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    evil = {"attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(config | evil))
    model = ModelPair.from_pretrained(folder, folder, device="cpu").slm.model
    assert model.config._attn_implementation == "sdpa"


def test_missing_weights_are_refused_by_name(checkpoint):
    folder = checkpoint()
    tensors = tensors_of(weights(folder))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    assert "lacks weights of Qwen3ForCausalLM: 1 (model.layers.1.mlp.up_proj.weight)" in refusal(
        folder
    )


def test_weights_of_another_shape(checkpoint):
    folder = checkpoint()
    tensors = tensors_of(weights(folder))
    tensors["model.norm.weight"] = torch.ones(33)
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    assert "model.norm.weight is [33], Qwen3ForCausalLM wants [32]" in refusal(folder)


def test_pickle_only(checkpoint, tmp_path):
    folder = checkpoint()
    torch.save({"w": torch.zeros(4)}, folder / "pytorch_model.bin")
    weights(folder).unlink()
    assert "only pickled weights (pytorch_model.bin)" in refusal(folder)
    assert "convert them to safetensors" in refusal(folder)


def test_no_weights(checkpoint):
    folder = checkpoint()
    weights(folder).unlink()
    assert refusal(folder).endswith("has no model.safetensors")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    assert "has no model.safetensors (it has model-q4.gguf)" in refusal(folder)


def test_missing_shards_are_named(checkpoint):
    folder = checkpoint(max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    message = refusal(folder)
    assert f"1 of {len(shards)} weight files are missing ({shards[1].name})" in message
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../x.safetensors"}}))
    assert "weights must lie beside their index" in refusal(folder)
    index.write_text("{}")
    assert "has no weight_map" in refusal(folder)


@pytest.mark.parametrize("suffix", [".incomplete", ".partial"])
def test_half_downloaded(checkpoint, suffix):
    folder = checkpoint()
    weights(folder).rename(folder / f"model.safetensors{suffix}")
    assert f"half-downloaded: model.safetensors{suffix} is unfinished" in refusal(folder)


def test_half_downloaded_by_the_hub_client(checkpoint):
    folder = checkpoint()
    cache = folder / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    weights(folder).rename(cache / "abc.incomplete")
    assert "half-downloaded: abc.incomplete is unfinished" in refusal(folder)


def truncated(data: bytes) -> bytes:
    return data[:-100]


def cut_in_header(data: bytes) -> bytes:
    return data[:200]


def with_a_tail(data: bytes) -> bytes:
    return data + b"\0" * 10


def zipped(data: bytes) -> bytes:
    return b"PK\x03\x04" + data


def pickled(data: bytes) -> bytes:
    return pickle.dumps({"w": [1.0] * 100})


def noise(data: bytes) -> bytes:
    return bytes(range(255, 0, -1)) * 40


def broken_header(data: bytes) -> bytes:
    return (20).to_bytes(8, "little") + b'{"a": {"dtype": 1}} ' + b"\0" * 8


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "is cut short: "),
        (cut_in_header, "is cut short within its header"),
        (with_a_tail, "is too long: "),
        (lambda data: b"", "is empty"),
        (lambda data: b"\x01", "is not a safetensors file"),
        (lambda data: LFS, "git-LFS pointer"),
        (lambda data: HTML, "web page"),
        (zipped, "zip archive or pickle"),
        (pickled, "is a pickle"),
        (noise, "is not a safetensors file"),
        (broken_header, "is not a safetensors file: its header is broken"),
    ],
)
def test_broken_weights(checkpoint, damage, words):
    folder = checkpoint()
    weights(folder).write_bytes(damage(weights(folder).read_bytes()))
    message = refusal(folder)
    assert words in message and str(weights(folder)) in message


def test_renamed_torch_save(checkpoint):
    folder = checkpoint()
    torch.save({"w": torch.zeros(4)}, weights(folder))
    assert zipfile.is_zipfile(weights(folder))
    assert "zip archive or pickle" in refusal(folder)


def test_a_header_of_640_bytes_is_no_pickle(tmp_path):
    """640 is 0x0280: read as bytes it starts like a pickle of protocol 2."""
    for length in (640, 0x0380):
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
        path = tmp_path / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header + b"\0" * 4)
        assert read_safetensors_header(path) == header


def test_no_tokenizer(checkpoint):
    folder = checkpoint()
    for file in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
        file.unlink()
    assert "tokenizer" in refusal(folder)


def test_a_tokenizer_of_another_schema(checkpoint):
    folder = checkpoint()
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer of" in refusal(folder)


def test_an_adapter_is_no_model(checkpoint):
    folder = checkpoint()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/x"}))
    assert "holds a PEFT adapter" in refusal(folder)


def test_revision_of_a_folder(checkpoint):
    folder = checkpoint()
    with pytest.raises(UsageError, match="only Hub ids have one"):
        ModelPair.from_pretrained(folder, folder, device="cpu", revision="main")
