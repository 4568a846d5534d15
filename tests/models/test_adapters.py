"""LoRA adapters: merged they compute what PEFT computes, and misfits are refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.models import ModelPair

PROMPT = torch.tensor([[5, 6, 7, 8]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_adapter(model, folder: Path, seed: int = 0, config=None) -> Path:
    """A LoRA whose both factors are random, so that it changes what the model computes."""
    peft_model = get_peft_model(model, config or LoraConfig(r=4, target_modules=TARGETS))
    torch.manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft_model.save_pretrained(folder)
    return folder


def refusal(folder: Path, adapter: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        ModelPair.from_pretrained(folder, folder, device="cpu", slm_adapters=[str(adapter)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_merged_logits_are_pefts(checkpoint, tiny_model, tmp_path):
    folder = checkpoint()
    one = save_adapter(tiny_model(), tmp_path / "one")
    pair = ModelPair.from_pretrained(folder, folder, device="cpu", slm_adapters=[str(one)])
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(tiny_model(), one).eval()(PROMPT).logits
        assert not torch.allclose(tiny_model()(PROMPT).logits, wanted, atol=1e-2)
        torch.testing.assert_close(pair.slm.model(PROMPT).logits, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(pair.llm.model(PROMPT).logits, tiny_model()(PROMPT).logits)
    assert type(pair.slm.model) is type(pair.llm.model)
    assert not any("lora" in name for name, _ in pair.slm.model.named_parameters())
    assert not any(p.requires_grad for p in pair.slm.model.parameters())
    assert pair.slm.fingerprint.adapters == (str(one),)
    assert "adapters" in pair.llm.fingerprint.mismatch(pair.slm.fingerprint)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_modules_come_along(checkpoint, tiny_model, tmp_path, tied):
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"])
    model = tiny_model(tie_word_embeddings=tied)
    peft_model = get_peft_model(model, config)
    torch.nn.init.normal_(peft_model.get_output_embeddings().modules_to_save.default.weight)
    peft_model.save_pretrained(tmp_path / "adapter")
    folder = checkpoint(tie_word_embeddings=tied)
    names = [str(tmp_path / "adapter")]
    pair = ModelPair.from_pretrained(folder, folder, device="cpu", slm_adapters=names)
    fresh = tiny_model(tie_word_embeddings=tied)
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(fresh, names[0]).eval()(PROMPT).logits
        torch.testing.assert_close(pair.slm.model(PROMPT).logits, wanted, atol=1e-4, rtol=1e-4)


def test_two_adapters_add_up(checkpoint, tiny_model, tmp_path):
    folder = checkpoint()
    one = save_adapter(tiny_model(), tmp_path / "one", seed=1)
    two = save_adapter(tiny_model(), tmp_path / "two", seed=2)
    names = [str(one), str(two)]
    pair = ModelPair.from_pretrained(
        folder, folder, device="cpu", slm_adapters=names, llm_adapters=names
    )
    assert pair.slm is pair.llm
    wanted = PeftModel.from_pretrained(tiny_model(), one).merge_and_unload()
    wanted = PeftModel.from_pretrained(wanted, two).merge_and_unload()
    with torch.inference_mode():
        torch.testing.assert_close(pair.slm.model(PROMPT).logits, wanted(PROMPT).logits)


def test_weights_of_an_adapter_are_in_the_fingerprint(checkpoint, tiny_model, tmp_path):
    folder, adapter = checkpoint(), tmp_path / "adapter"
    hashes = set()
    for seed in (1, 2):
        save_adapter(tiny_model(), adapter, seed)
        pair = ModelPair.from_pretrained(folder, folder, device="cpu", slm_adapters=[str(adapter)])
        hashes |= {pair.slm.fingerprint.weights_sha256, pair.llm.fingerprint.weights_sha256}
    assert len(hashes) == 3


def test_another_shape(checkpoint, tiny_model, tmp_path):
    adapter = save_adapter(tiny_model(hidden_size=64), tmp_path / "adapter")
    message = refusal(checkpoint(), adapter)
    assert "does not fit Qwen3ForCausalLM: size mismatch" in message


def test_other_layers(checkpoint, tiny_model, tmp_path):
    more = save_adapter(tiny_model(num_hidden_layers=3), tmp_path / "more")
    assert "does not fit Qwen3ForCausalLM: no place for" in refusal(checkpoint(), more)
    fewer = save_adapter(tiny_model(num_hidden_layers=1), tmp_path / "fewer")
    assert "has no weights for" in refusal(checkpoint(), fewer)
    gpt = save_adapter(
        tiny_model("gpt2"),
        tmp_path / "gpt",
        config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    )
    assert "does not fit Qwen3ForCausalLM" in refusal(checkpoint(), gpt)


def test_only_lora(checkpoint, tiny_model, tmp_path):
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapter = save_adapter(tiny_model(), tmp_path / "adapter", config=config)
    assert "of kind IA3: only LORA can be merged" in refusal(checkpoint(), adapter)


def test_tied_embeddings_cannot_be_changed_alone(checkpoint, tiny_model, tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens"])
    adapter = save_adapter(tiny_model(), tmp_path / "adapter", config=config)
    folder = checkpoint("tied", tie_word_embeddings=True)
    assert "changes embed_tokens, which this model ties" in refusal(folder, adapter)
    free = checkpoint("free", tie_word_embeddings=False)
    ModelPair.from_pretrained(free, free, device="cpu", slm_adapters=[str(adapter)])


def test_pickled_adapter(checkpoint, tiny_model, tmp_path):
    adapter = save_adapter(tiny_model(), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    torch.save({"w": torch.zeros(4)}, adapter / "adapter_model.bin")
    file.unlink()
    assert "only pickled weights (adapter_model.bin)" in refusal(checkpoint(), adapter)


def test_broken_adapters(checkpoint, tiny_model, tmp_path):
    folder = checkpoint()
    assert refusal(folder, tmp_path / "none").endswith("none: no such folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(folder, empty).endswith("has no adapter_config.json")
    adapter = save_adapter(tiny_model(), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "is cut short" in refusal(folder, adapter)
    file.unlink()
    assert refusal(folder, adapter).endswith("has no adapter_model.safetensors")
    file.write_bytes(whole)
    (adapter / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refusal(folder, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": "x"}))
    assert "does not fit" in refusal(folder, adapter)


def test_non_finite_adapters(checkpoint, tiny_model, tmp_path):
    adapter = save_adapter(tiny_model(), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert "does not fit" in refusal(checkpoint(), adapter)


def test_without_peft(checkpoint, tiny_model, tmp_path, monkeypatch):
    folder, adapter = checkpoint(), save_adapter(tiny_model(), tmp_path / "adapter")
    monkeypatch.setattr("r2r_glimp.models.adapters.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'r2r_glimp\[train\]'"):
        ModelPair.from_pretrained(folder, folder, device="cpu", slm_adapters=[str(adapter)])
