"""A whole decoder layer in two kernel calls, with the attention between them.

    x ─▶ before_attention: norm, q k v, their norms, rotary embedding
      ─▶ the paged context of the call attends
      ─▶ after_attention: output projection, residual, norm, MLP, residual

What a layer of the Llama kind (Llama, Qwen2, Qwen3, Mistral, ...) computes, rounded where the
models round. One is exchanged only if it hands the attention the same queries, keys and values as
the original, and gives the same output, on random input.

Shape suffixes: T tokens of the ragged batch, H hidden size, Q query heads, K key/value heads, D
head size.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from r2r_glimp.attention.paged import LayerSpec, PagedContext
from r2r_glimp.native.library import DecoderStruct, Library, load_library


class NativeLayer(nn.Module):
    """A decoder layer on the CPU in bfloat16.

    Args:
        layer: the original; it is left as it is.
        index: its place.
        spec: what its attention asks for.
        make_linear: packs a linear layer; see `NativeLinear`.
    """

    def __init__(
        self,
        layer: Any,
        index: int,
        spec: LayerSpec,
        make_linear: Callable[[nn.Linear], nn.Module],
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.spec = index, spec
        self.qkv = make_linear(join([attention.q_proj, attention.k_proj, attention.v_proj]))
        self.o = make_linear(attention.o_proj)
        self.gate_up = make_linear(join([mlp.gate_proj, mlp.up_proj]))
        self.down = make_linear(mlp.down_proj)
        self.norm_1, self.norm_2 = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.num_heads = attention.q_proj.out_features // spec.head_dim
        linears = ("qkv", "o", "gate_up", "down")
        norms = {"norm_1": "eps_1", "norm_2": "eps_2", "q_norm": "q_eps", "k_norm": "k_eps"}
        self._struct = DecoderStruct(
            hidden=attention.q_proj.in_features,
            heads=self.num_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            inner=mlp.down_proj.in_features,
            **{name: getattr(self, name).packed.data_ptr() for name in linears},
            **{f"{name}_bias": _pointer(getattr(self, name).bias) for name in linears},
            **{name: _pointer(_weight(getattr(self, name))) for name in norms},
            **{eps: norm_eps(getattr(self, name)) or 0.0 for name, eps in norms.items()},
        )

    def forward(
        self,
        hidden_states: Tensor,  # [1, T, H]
        *,
        position_embeddings: tuple[Tensor, Tensor],  # [1, T, D] each
        paged: PagedContext,
        **_: Any,
    ) -> Tensor:
        library = load_library()
        assert isinstance(library, Library) and hidden_states.dtype is torch.bfloat16
        x, spec = hidden_states.contiguous(), self.spec
        cos, sin = (table.contiguous() for table in position_embeddings)
        length, threads = x.shape[1], torch.get_num_threads()
        struct = ctypes.byref(self._struct)
        heads = (self.num_heads, spec.kv_heads, spec.kv_heads)
        qkv = x.new_empty(length, sum(heads), spec.head_dim)
        library.before_attention(
            struct, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), qkv.data_ptr(), length, threads
        )
        query_TQD, key_TKD, value_TKD = qkv.split(heads, dim=1)
        attended_TQD = paged.attend(self.index, query_TQD, key_TKD, value_TKD, spec, None)
        attended_TQD = attended_TQD.contiguous()
        out = torch.empty_like(x)
        library.after_attention(
            struct, x.data_ptr(), attended_TQD.data_ptr(), out.data_ptr(), length, threads
        )
        return out


def join(linears: list[nn.Linear]) -> nn.Linear:
    """One linear layer whose outputs are those of several, one after another."""
    first = linears[0]
    outputs = sum(linear.out_features for linear in linears)
    joined = nn.Linear(first.in_features, outputs, bias=first.bias is not None, device="meta")
    joined.weight = nn.Parameter(torch.cat([p.weight for p in linears]), requires_grad=False)
    if first.bias is not None:
        joined.bias = nn.Parameter(torch.cat([p.bias for p in linears]), requires_grad=False)
    return joined


def norm_eps(norm: nn.Module | None) -> float | None:
    """The epsilon of something that calls itself an RMS norm, else None."""
    if norm is None or not type(norm).__name__.endswith("RMSNorm"):
        return None
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) and isinstance(_weight(norm), nn.Parameter) else None


def find_layer(
    layer: nn.Module,
    index: int,
    spec: LayerSpec,
    make_linear: Callable[[nn.Linear], nn.Module],
) -> NativeLayer | None:
    """The layer as a native one, None where that would compute something else."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    q, k, v, o = (getattr(attention, f"{name}_proj", None) for name in "qkvo")
    gate, up, down = (getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down"))
    linears = (q, k, v, o, gate, up, down)
    if not all(type(linear) is nn.Linear and linear.in_features % 2 == 0 for linear in linears):
        return None
    norms = [getattr(layer, n, None) for n in ("input_layernorm", "post_attention_layernorm")]
    if spec.softcap is not None or spec.has_sinks or spec.head_dim != spec.value_dim:
        return None
    if not all(norm_eps(norm) is not None for norm in norms):
        return None
    inner = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if inner != [None, None] and not all(
        norm_eps(norm) is not None and len(_weight(norm)) == spec.head_dim for norm in inner
    ):
        return None
    for group in ((q, k, v), (gate, up)):
        if len({linear.bias is None for linear in group}) > 1:  # type: ignore[union-attr]
            return None
    candidate = NativeLayer(layer, index, spec, make_linear)
    return candidate if _same(layer, candidate, spec) else None


class _Plain:
    """A paged context without pages: three tokens attend to each other; remembers what came."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def attend(
        self,
        layer: int,
        query_TQD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        spec: LayerSpec,
        sinks_Q: Tensor | None,
    ) -> Tensor:
        self.given = [query_TQD, key_TKD, value_TKD]
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in self.given)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=spec.scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)


@torch.inference_mode()
def _same(layer: nn.Module, candidate: NativeLayer, spec: LayerSpec) -> bool:
    """Whether a candidate hands on and gives what the original does, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    hidden_size = candidate.norm_1.weight.shape[0]
    # Small, so that the residual does not cover up what is added to it.
    x = torch.randn(1, 3, hidden_size, generator=generator).mul(1e-2).bfloat16()
    angle = torch.rand(1, 3, spec.head_dim // 2, generator=generator).mul(6.28).repeat(1, 1, 2)
    turns = (angle.cos().bfloat16(), angle.sin().bfloat16())
    results = []
    for one in (layer, candidate):
        context = _Plain()
        try:
            out = one(
                x,
                attention_mask=None,
                position_ids=torch.arange(3).unsqueeze(0),
                past_key_values=None,
                use_cache=False,
                position_embeddings=turns,
                paged=context,
            )
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False  # it takes something else, and so is no such layer
        results.append([*context.given, out])
    return all(
        isinstance(got, Tensor)
        and isinstance(wanted, Tensor)
        and got.shape == wanted.shape
        and bool(((got - wanted).abs().max() <= 0.02 * wanted.abs().max()).item())
        for wanted, got in zip(*results, strict=True)
    )


def _weight(norm: Any) -> Any:
    return getattr(norm, "weight", None)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
