"""Whole decoder layers in one kernel call, or one in two with the attention between them.

    x ─▶ run_layers: all layers that follow each other, attention over the pages included

    x ─▶ before_attention: norm, q k v, their norms, rotary embedding
      ─▶ the paged context of the call attends: prompts, which torch attends to faster
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
from transformers import PreTrainedModel

from r2r_glimp.attention.native import NativeBatch
from r2r_glimp.attention.paged import LayerSpec, PagedContext
from r2r_glimp.native.library import DecoderStruct, Library


class NativeLayer(nn.Module):
    """A decoder layer on the CPU in bfloat16.

    Args:
        layer: the original; it is left as it is.
        index: its place.
        spec: what its attention asks for.
        library: the kernels.
        pack: packs its linear layers; see `NativeLinear`.
    """

    def __init__(
        self,
        layer: Any,
        index: int,
        spec: LayerSpec,
        library: Library,
        pack: Callable[[list[nn.Linear], Library], list[nn.Module]],
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.spec, self.library = index, spec, library
        qkv = join([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = join([mlp.gate_proj, mlp.up_proj])
        self.qkv, self.o, self.gate_up, self.down = pack(
            [qkv, attention.o_proj, gate_up, mlp.down_proj], library
        )
        self.norm_1, self.norm_2 = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.num_heads = attention.q_proj.out_features // spec.head_dim
        norms = {"norm_1": "eps_1", "norm_2": "eps_2", "q_norm": "q_eps", "k_norm": "k_eps"}
        self._struct = DecoderStruct(
            heads=self.num_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            **{name: getattr(self, name).struct for name in ("qkv", "o", "gate_up", "down")},
            **{name: _pointer(_weight(getattr(self, name))) for name in norms},
            **{eps: norm_eps(getattr(self, name)) or 0.0 for name, eps in norms.items()},
        )
        self.link([self])

    def link(self, run: list["NativeLayer"]) -> None:
        """Let this layer compute those that follow it too.

        Args:
            run: this one and the others, neighbours in the model: each reads what the one before
                it gives, and the same rotary embedding.
        """
        self._run = run
        self._structs = (DecoderStruct * len(run))(*(layer._struct for layer in run))

    def forward(
        self,
        hidden_states: Tensor,  # [1, T, H]
        *,
        position_embeddings: tuple[Tensor, Tensor],  # [1, T, D] each
        paged: PagedContext,
        **_: Any,
    ) -> Tensor:
        assert hidden_states.dtype is torch.bfloat16
        if not isinstance(paged, NativeBatch) or paged.long:
            return self._one(hidden_states, position_embeddings, paged)
        if self.index < paged.num_run:
            return hidden_states  # an earlier one has computed it
        # A layer that somebody looks at ends a run, so that its output is there to be seen.
        ends = (i for i, layer in enumerate(self._run, start=1) if layer._forward_hooks)
        count = next(ends, len(self._run))
        for layer in self._run[:count]:
            paged.backend.fill(layer.index, layer.spec, layer.num_heads)
        x = hidden_states.clone(memory_format=torch.contiguous_format)
        cos, sin = (table.contiguous() for table in position_embeddings)
        paged.run_layers(ctypes.addressof(self._structs), self.index, count, x, cos, sin)
        return x

    def _one(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        paged: PagedContext,
    ) -> Tensor:
        """This layer alone; the context attends."""
        x, spec, library = hidden_states.contiguous(), self.spec, self.library
        cos, sin = (table.contiguous() for table in position_embeddings)
        length, threads = x.shape[1], torch.get_num_threads()
        struct = ctypes.addressof(self._struct)
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


def link_runs(model: PreTrainedModel, layers: list[NativeLayer]) -> None:
    """Let layers that follow each other be computed in one call.

    One pass over two tokens tells which do: those that are given the very tensor that the one
    before them returned, and the very same rotary embedding.
    """
    seen: list[tuple[NativeLayer, Tensor, Tensor, Tensor]] = []  # layer, input, cos, output

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert isinstance(layer, NativeLayer)
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((layer, given, kwargs["position_embeddings"][0], output))

    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode():
            model(
                input_ids=torch.zeros((1, 2), dtype=torch.long),
                position_ids=torch.arange(2).unsqueeze(0),
                use_cache=False,
                paged=_Plain(),
            )
    finally:
        for hook in hooks:
            hook.remove()
    runs: list[list[NativeLayer]] = []
    for i, (layer, given, cos, _) in enumerate(seen):
        before, cos_before, output = seen[i - 1][0], seen[i - 1][2], seen[i - 1][3]
        neighbours = i > 0 and layer.index == before.index + 1
        if not (neighbours and given is output and cos is cos_before):
            runs.append([])
        runs[-1].append(layer)
    for run in runs:
        for i, layer in enumerate(run):
            layer.link(run[i:])


def is_plain(module: nn.Module | None) -> bool:
    """Whether something is a linear layer whose weight is a matrix of numbers, not quantised."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


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
    library: Library,
    pack: Callable[[list[nn.Linear], Library], list[nn.Module]],
) -> NativeLayer | None:
    """The layer as a native one, None where that would compute something else."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    q, k, v, o = (getattr(attention, f"{name}_proj", None) for name in "qkvo")
    gate, up, down = (getattr(mlp, f"{name}_proj", None) for name in ("gate", "up", "down"))
    linears = (q, k, v, o, gate, up, down)
    if not all(is_plain(linear) and linear.in_features % 2 == 0 for linear in linears):  # type: ignore[union-attr]
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
    candidate = NativeLayer(layer, index, spec, library, pack)
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
