"""The one function registered with transformers' `AttentionInterface`, and the probe that proves a
model uses it.

Every layer of every model calls `paged_attention`; the paged context travels as a keyword argument
of the model call. What a layer asks for (scaling, sliding window, softcap, sinks) is honoured or
refused by name.

Shape suffixes: T tokens of the ragged batch, Q query heads, K key/value heads, D head size.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from r2r_glimp.core import CheckpointError

IMPLEMENTATION = "r2r_glimp_paged"
# What attention layers pass along that changes nothing here: masks and positions are the plan's
# business.
_HARMLESS = frozenset(
    "dropout position_ids cache_position past_key_values use_cache output_attentions "
    "output_hidden_states position_embeddings training return_dict output_router_logits".split()
)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer needs of a backend: its KV geometry and the variant of attention it
    computes."""

    kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int  # of values; another width in expanded latent attention (DeepSeek-V3)
    scaling: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


def kv_bytes_per_token(layers: list[LayerSpec], dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, over all layers."""
    return sum(s.kv_heads * (s.head_dim + s.value_dim) for s in layers) * dtype.itemsize


class PagedContext(Protocol):
    """What the engine passes to a model call: a backend bound to one planned batch."""

    def attend(
        self,
        layer: int,
        query_TQD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        spec: LayerSpec,
        sinks_Q: Tensor | None,
    ) -> Tensor:
        """Write the new keys and values, return the attention output [T, Q, D]."""
        ...


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, Q, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,  # [1, K, T, D]
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    paged: PagedContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the block tables of a ragged batch, output [1, T, Q, D].

    Raises:
        CheckpointError: the layer asks for something the backends cannot honour.
    """
    name = type(module).__name__
    if paged is None:
        raise CheckpointError(
            f"{name} did not pass the paged context on: this architecture is not supported"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise CheckpointError(
            f"{name} attends in both directions: only causal language models are supported"
        )
    if attention_mask is not None:
        raise CheckpointError(
            f"{name} builds its own attention mask: this architecture is not supported"
        )
    for option, given in kwargs.items():
        if option not in _HARMLESS and given is not None and given is not False:
            raise CheckpointError(
                f"{name} asks for {option!r} in its attention, which is not supported"
            )
    spec = LayerSpec(
        kv_heads=key.shape[1],
        head_dim=key.shape[3],
        value_dim=value.shape[3],
        scaling=key.shape[3] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window,
        softcap=softcap,
        has_sinks=s_aux is not None,
    )
    out_TQD = paged.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        spec,
        s_aux,
    )
    return out_TQD.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)


class _Probe:
    """Records what each layer asks for; computes nothing."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSpec] = {}

    def attend(
        self,
        layer: int,
        query_TQD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        spec: LayerSpec,
        sinks_Q: Tensor | None,
    ) -> Tensor:
        if layer in self.layers:
            raise CheckpointError(f"layer {layer} attends twice, which is not supported")
        self.layers[layer] = spec
        return query_TQD.new_zeros(*query_TQD.shape[:2], spec.value_dim)


def install(model: PreTrainedModel) -> list[LayerSpec]:
    """Switch a model to paged attention and prove by one forward pass that every layer reaches it.

    Returns:
        The spec of every layer, in order.

    Raises:
        CheckpointError: the architecture bypasses `AttentionInterface`, keeps other state, or asks
            for a variant that is not supported; it is named.
    """
    architecture = type(model).__name__
    refusal = f"{architecture} cannot run on the paged engine: "
    if not getattr(model, "_supports_attention_backend", False):
        raise CheckpointError(
            refusal + "it does not dispatch attention through transformers' AttentionInterface"
        )
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    unsupported = kinds - {"full_attention", "sliding_attention"}
    if unsupported:
        raise CheckpointError(refusal + f"it has layers of kind {', '.join(sorted(unsupported))}")
    probe = _Probe()
    device = model.device
    ids = torch.zeros((1, 2), dtype=torch.long, device=device)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        with torch.inference_mode():
            model(
                input_ids=ids,
                position_ids=torch.arange(2, device=device).unsqueeze(0),
                use_cache=False,
                paged=probe,
            )
    except CheckpointError as error:
        raise CheckpointError(refusal + str(error)) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(refusal + f"the load probe failed ({error})") from error
    missing = sorted(set(range(config.num_hidden_layers)) - set(probe.layers))
    if missing:
        raise CheckpointError(
            refusal + f"layers {missing} never reached the registered attention function"
        )
    return [probe.layers[i] for i in sorted(probe.layers)]
