"""Models of real shapes with random weights: speed can be measured without downloading anything.

A shape is a name of `SHAPES`, a config.json, or a folder that holds one. Weights are random, so the
text is noise: routers that fix the share (`random`, `replay`) measure speed apart from quality.
"""

import itertools
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.initialization import no_init_weights

from r2r_glimp.core import UsageError
from r2r_glimp.models.loading import make_fingerprint, quiet
from r2r_glimp.models.pair import LoadedModel, ModelPair
from r2r_glimp.models.source import one_line


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _qwen3(64, 128, 2, 4, 2, vocab_size=1024, head_dim=16),
    "small": _qwen3(384, 1024, 8, 6, 2, vocab_size=1024, head_dim=64),
    "qwen3-0.1b": _qwen3(512, 1536, 8, 8, 4, head_dim=64),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8, tie_word_embeddings=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8, tie_word_embeddings=False),
}
_BLOCK = 2**20 + 7  # random numbers that are repeated over all weights; odd, so that rows differ


def read_shape(name: str) -> PreTrainedConfig:
    """The config of a shape.

    Raises:
        UsageError: no such name, or not a config.
    """
    if name in SHAPES:
        return Qwen3Config(**SHAPES[name])
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(f"no shape {name!r}: {', '.join(SHAPES)}, a config.json or its folder")
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds for what is no config
        raise UsageError(f"{path} is not a model's config: {one_line(error)}") from error
    config._attn_implementation = None
    return config


def make_model(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of a shape with random weights, the same at every call.

    Raises:
        UsageError: no such shape, or not of a causal language model.
    """
    model = _empty_model(shape, dtype)
    values = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    values = values.mul_(model.config.get_text_config().initializer_range).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # norms are made of ones already
                for part in parameter.view(-1).split(_BLOCK):
                    part.copy_(values[: len(part)])
    return model.to(device).eval().requires_grad_(False)


def count_parameters(shape: str) -> int:
    """Weights of a shape, tied ones counted once.

    Raises:
        UsageError: as `make_model`.
    """
    with torch.device("meta"):
        return sum(p.numel() for p in _empty_model(shape, torch.float32).parameters())


def _empty_model(shape: str, dtype: torch.dtype) -> Any:
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(read_shape(shape), dtype=dtype)
    except ValueError as error:
        raise UsageError(f"{shape} is not a causal language model: {one_line(error)}") from error
    model.tie_weights()
    return model


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with as many tokens: the bytes, and words of letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (
        "Ġ" + "".join(w) for n in (2, 3, 4) for w in itertools.product("etaoinshrdlu", repeat=n)
    )
    vocab = {token: i for i, token in enumerate(itertools.chain(letters, words)) if i < vocab_size}
    numbered = (f"Ġ{i}" for i in itertools.count())
    vocab |= {next(numbered): i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_pair(slm: str, llm: str, dtype: torch.dtype, device: torch.device) -> ModelPair:
    """A pair of random weights that shares one vocabulary; equal shapes are one model.

    Raises:
        UsageError: a shape does not exist, or the vocabularies differ in size.
    """
    sizes = [read_shape(name).get_text_config().vocab_size for name in (slm, llm)]
    tokenizer = make_tokenizer(min(sizes))

    def load(shape: str) -> LoadedModel:
        model = make_model(shape, dtype, device)
        named = make_fingerprint(model, tokenizer, name=shape, weights_sha256="random")
        return LoadedModel(model, tokenizer, named)

    first = load(slm)
    return ModelPair(slm=first, llm=first if slm == llm else load(llm))


def save_pair(slm: str, llm: str, dtype: torch.dtype, folder: Path) -> Path:
    """Writes a pair of random weights, with a chat template; returns the preset that names it.

    Raises:
        UsageError: as `make_pair`.
    """
    pair = make_pair(slm, llm, dtype, torch.device("cpu"))
    pair.slm.tokenizer.chat_template = "{{ messages[0]['content'] }}"  # both have the same one
    named = {}
    for role, loaded in (("slm", pair.slm), ("llm", pair.llm)):
        named[role] = str(folder / role)
        with quiet():
            loaded.model.save_pretrained(named[role])
            loaded.tokenizer.save_pretrained(named[role])
    preset = folder / "pair.yaml"
    preset.write_text(yaml.safe_dump(named), encoding="utf-8")
    return preset


def make_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids that share no prefix."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
