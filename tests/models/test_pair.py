"""Loading a pair: what comes out, and what is refused about the arguments."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from r2r_glimp.abacus.tokenizer import build_tokenizer
from r2r_glimp.core import CheckpointError, Model, UsageError
from r2r_glimp.models import LoadedModel, ModelPair
from r2r_glimp.models.placement import per_model, resolve_device

PROMPT = torch.tensor([[5, 6, 7, 8]])


def test_from_pretrained_gives_the_saved_models(checkpoint, tiny_model, tokenizer):
    slm, llm = checkpoint("slm", "qwen3", seed=1), checkpoint("llm", "llama", seed=2)
    pair = ModelPair.from_pretrained(slm, str(llm), device="cpu")
    assert pair[Model.SLM] is pair.slm and pair[Model.LLM] is pair.llm
    assert pair.same_vocabulary
    for loaded, architecture, seed in ((pair.slm, "qwen3", 1), (pair.llm, "llama", 2)):
        wanted = tiny_model(architecture, seed)(PROMPT).logits
        assert torch.equal(loaded.model(PROMPT).logits, wanted)
        assert not loaded.model.training
        assert not any(p.requires_grad for p in loaded.model.parameters())
        assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert loaded.device == torch.device("cpu") and loaded.dtype == torch.float32
        assert loaded.num_parameters == sum(
            p.numel() for p in tiny_model(architecture).parameters()
        )
        assert loaded.context_length == 1024
        assert loaded.eos_token_ids == {tokenizer.eos_token_id}
    assert pair.slm.name == str(slm)


def test_a_model_given_twice_is_loaded_once(checkpoint, monkeypatch):
    folder = checkpoint()
    pair = ModelPair.from_pretrained(folder, folder / ".." / "model", device="cpu")
    assert pair.slm is pair.llm
    other = ModelPair.from_pretrained(folder, folder, device="cpu", dtype=("float32", "bfloat16"))
    assert other.slm is not other.llm
    assert (other.slm.dtype, other.llm.dtype) == (torch.float32, torch.bfloat16)


def test_sharded_checkpoint(checkpoint, tiny_model):
    folder = checkpoint(max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    pair = ModelPair.from_pretrained(folder, folder, device="cpu")
    assert torch.equal(pair.slm.model(PROMPT).logits, tiny_model()(PROMPT).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_no_missing_weights(checkpoint, tied):
    folder = checkpoint(tie_word_embeddings=tied)
    model = ModelPair.from_pretrained(folder, folder, device="cpu").slm.model
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same is tied


def test_auto_dtype_is_the_checkpoints(tmp_path, tiny_model, tokenizer):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert ModelPair.from_pretrained(tmp_path, tmp_path, device="cpu").slm.dtype == torch.bfloat16
    as_float = ModelPair.from_pretrained(tmp_path, tmp_path, device="cpu", dtype=torch.float32)
    assert as_float.slm.dtype == torch.float32


def test_one_vocabulary_however_padded(tiny_model, tokenizer):
    small = LoadedModel.from_model(tiny_model(vocab_size=512), tokenizer, name="small")
    large = LoadedModel.from_model(tiny_model("llama", vocab_size=576), build_tokenizer())
    assert ModelPair(slm=small, llm=large).same_vocabulary
    assert (small.fingerprint.vocab_size, large.fingerprint.vocab_size) == (512, 576)
    assert (small.name, large.name) == ("small", "in-memory")


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_makes_another_vocabulary(tiny_model, tokenizer, special):
    more = build_tokenizer()
    more.add_tokens(["<tool>"], special_tokens=special)
    pair = ModelPair(
        slm=LoadedModel.from_model(tiny_model(), tokenizer),
        llm=LoadedModel.from_model(tiny_model(), more),
    )
    assert not pair.same_vocabulary


def test_eos_ids_are_of_config_generation_config_and_tokenizer(tiny_model, tokenizer):
    model = tiny_model(eos_token_id=[3, 4])
    model.generation_config.eos_token_id = 5
    loaded = LoadedModel.from_model(model, tokenizer)
    assert loaded.eos_token_ids == {3, 4, 5, tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
    ],
)
def test_context_length(tiny_model, tokenizer, rope, length):
    model = tiny_model(rope_parameters={"rope_theta": 1e4, **rope})
    assert LoadedModel.from_model(model, tokenizer).context_length == length


def test_context_length_that_nobody_knows(tiny_model, tokenizer):
    loaded = LoadedModel.from_model(tiny_model("bloom"), tokenizer, name="alibi")
    with pytest.raises(CheckpointError, match="alibi does not say how long"):
        _ = loaded.context_length


def test_slow_tokenizers_are_refused_by_name(tiny_model, checkpoint):
    with pytest.raises(CheckpointError, match="slow tokenizer ByT5Tokenizer"):
        LoadedModel.from_model(tiny_model(), ByT5Tokenizer())
    folder = checkpoint()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="slow tokenizer ByT5Tokenizer"):
        ModelPair.from_pretrained(folder, folder, device="cpu")


def test_dtype_and_device_are_checked(checkpoint, monkeypatch):
    folder = checkpoint()
    for device in ("cuda", "cuda:7", "mps", "gpu", "", "cuda:x"):
        with pytest.raises(UsageError, match="device=") as error:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            ModelPair.from_pretrained(folder, folder, device=device)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="auto, float32, bfloat16, float16"):
        ModelPair.from_pretrained(folder, folder, device="cpu", dtype="int8")
    with pytest.raises(UsageError, match="slm_adapters='x' is one string"):
        ModelPair.from_pretrained(folder, folder, device="cpu", slm_adapters="x")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="there are 2 GPUs"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


def test_one_value_or_one_for_each():
    assert per_model("device", "cpu", "auto") == ("cpu", "cpu")
    assert per_model("device", {"llm": "cuda"}, "auto") == ("auto", "cuda")
    assert per_model("device", ["cpu", "cuda"], "auto") == ("cpu", "cuda")
    assert per_model("revision", None, None) == (None, None)
    with pytest.raises(UsageError, match="unknown key 'large'"):
        per_model("device", {"large": "cpu"}, "auto")
    with pytest.raises(UsageError, match="has 3 values"):
        per_model("device", ["cpu"] * 3, "auto")


def test_importing_the_package_is_cheap():
    code = "import sys, r2r_glimp.models as m; m.preset_names(); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
