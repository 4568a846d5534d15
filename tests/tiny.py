"""Tiny random models of many architectures, to compare with Hugging Face's `generate`."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 8  # of sliding-window attention: short enough for a test to leave it

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # wide enough that attention is far from uniform and the best token far from the second best
    "initializer_range": 0.2,
}
_NO_GROUPS = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
_ALTERNATING = ["sliding_attention", "full_attention"]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "head_dim": 8},
    "qwen2": {**_LLAMA_LIKE},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mistral": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": WINDOW},
    "gemma2": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": False,  # tied, its large embeddings only ever repeat the last token
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
    },
    "phi3": {**_LLAMA_LIKE},
    "gpt_oss": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granite": {**_LLAMA_LIKE, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
    "olmo2": {**_LLAMA_LIKE},
    "smollm3": {**_LLAMA_LIKE, "no_rope_layer_interval": 2},
    "cohere2": {
        **_LLAMA_LIKE,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
        "logit_scale": 1.0,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {**_NO_GROUPS},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "initializer_range": 0.2,
    },
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "init_std": 0.2,
        "tie_word_embeddings": False,
    },
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4},
    "gemma3_text": {
        **_LLAMA_LIKE,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING,
    },
    "deepseek_v3": {
        **_LLAMA_LIKE,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 4,  # narrower than the keys
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "falcon": {**_NO_GROUPS, "multi_query": True, "tie_word_embeddings": False},
    "bloom": {
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    },
}


def make_tiny_model(
    architecture: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **sizes: Any
) -> PreTrainedModel:
    """A random model in float32 and eval mode; the same for the same seed, whatever ran before.

    Args:
        architecture: a key of `ARCHITECTURES` (a `model_type` of transformers).
        tokenizer: gives the vocabulary size (padded to a multiple of 32) and the special ids.
        seed: of its weights.
        sizes: config values that replace the table's.
    """
    config = CONFIG_MAPPING[architecture](
        **{
            "vocab_size": -(-len(tokenizer) // 32) * 32,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            **ARCHITECTURES[architecture],
            **sizes,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # near zero by default, so that nobody would miss them
                torch.nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)
