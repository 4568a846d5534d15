"""Parts of a Hugging Face model exchanged for faster ones that compute the same, on the CPU.

    decoder layer        ─▶ NativeLayer        two kernel calls around its attention; see layer.py
    nn.Linear            ─▶ NativeLinear (bf16 products of this CPU), else MkldnnLinear
    ...RMSNorm           ─▶ NativeRMSNorm      one pass instead of six
    gate, up, SiLU, down ─▶ NativeMLP          gate and up in one product

Norms and MLPs are recognised by what they compute: a candidate is exchanged when it gives what the
original gives on random input. Weights are packed once and the plain ones let go, save for those
that are an embedding too.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from r2r_glimp.attention.paged import LayerSpec
from r2r_glimp.native.layer import NativeLayer, find_layer, is_plain, join, link_runs, norm_eps
from r2r_glimp.native.library import SUFFIXES, Library, LinearStruct


def accelerate(model: PreTrainedModel, layers: list[LayerSpec], library: Library | None) -> str:
    """Exchange what can be, in place; a second call changes nothing.

    Args:
        model: on the CPU, under paged attention.
        layers: what its layers ask of the attention, in order.
        library: the kernels, if there are any.

    Returns:
        What computes the model now, for people: `native layer (28), native linear (1), ...`.
    """
    if isinstance(library, Library) and model.dtype in SUFFIXES:
        if library.has_linear and model.dtype is torch.bfloat16:
            _exchange_layers(model, layers, library)
        for parent, name, module in _children(model):
            if candidate := _norm(module, model.dtype, library) or _mlp(module, library):
                if _same(module, candidate, model.dtype):
                    setattr(parent, name, candidate)
    shared = _embedding_weights(model)
    for parent, name, module in _children(model):
        if isinstance(module, nn.Linear) and is_plain(module):
            setattr(parent, name, _linear(module, library, keep=id(module.weight) in shared))
    return _describe(model)


def _pack_together(linears: list[nn.Linear], library: Library) -> list[nn.Module]:
    """Linear layers of which one is read after the other: one piece of memory."""
    sizes = [packed_size(linear) for linear in linears]
    parts = library.empty(sum(sizes), torch.bfloat16).split(sizes)
    return [
        NativeLinear(linear, library, packed=part)
        for linear, part in zip(linears, parts, strict=True)
    ]


def _exchange_layers(model: PreTrainedModel, layers: list[LayerSpec], library: Library) -> None:
    stack = getattr(model.base_model, "layers", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) != len(layers):
        return
    found = []
    for i, spec in enumerate(layers):
        if native := find_layer(stack[i], i, spec, library, _pack_together):
            stack[i] = native
            found.append(native)
    if found:
        link_runs(model, found)


class _Packed(nn.Module):
    """A linear layer whose weight is kept in another order; `weight` only tells shape and dtype,
    unless it is an embedding too."""

    def __init__(self, linear: nn.Linear, *, keep: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        self.weight = weight if keep else nn.Parameter(weight.to("meta"), requires_grad=False)
        self.bias = linear.bias


class NativeLinear(_Packed):
    """bf16 products by the kernels; see products.h for the order of the weight.

    Args:
        linear: it is left as it is.
        library: the kernels.
        keep: its weight is an embedding too, and stays beside the packed one.
        packed: where the packed weight goes, `packed_size` numbers; by default new memory.
    """

    packed: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        library: Library,
        *,
        keep: bool = False,
        packed: Tensor | None = None,
    ) -> None:
        super().__init__(linear, keep=keep)
        self.library = library
        outputs, inputs = linear.weight.shape
        if packed is None:
            packed = library.empty(packed_size(linear), torch.bfloat16)
        weight = linear.weight.detach().contiguous()
        library.pack_linear(
            weight.data_ptr(), packed.data_ptr(), outputs, inputs, torch.get_num_threads()
        )
        self.register_buffer("packed", packed, persistent=False)
        bias = None if self.bias is None else self.bias.data_ptr()
        self.struct = LinearStruct(packed.data_ptr(), bias, outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype is torch.bfloat16
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        self.library.linear(
            ctypes.addressof(self.struct),
            x.data_ptr(),
            out.data_ptr(),
            x.numel() // self.in_features,
            torch.get_num_threads(),
        )
        return out


def packed_size(linear: nn.Linear) -> int:
    """Numbers of a linear layer's packed weight: outputs in panels of 32."""
    return -(-linear.out_features // 32) * 32 * linear.in_features


class MkldnnLinear(_Packed):
    """Products by oneDNN with a weight in its own order, which plain `nn.Linear` makes anew at
    every call."""

    packed: Tensor

    def __init__(self, linear: nn.Linear, *, keep: bool = False) -> None:
        super().__init__(linear, keep=keep)
        weight = linear.weight.detach().contiguous()
        self.register_buffer(
            "packed", torch.ops.mkldnn._reorder_linear_weight(weight, 8), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class NativeRMSNorm(nn.Module):
    """weight * x / rms(x), rounded like the models' own: [..., H] to [..., H]."""

    def __init__(self, weight: nn.Parameter, eps: float, library: Library) -> None:
        super().__init__()
        self.weight, self.eps, self.library = weight, eps, library

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self.library.rms_norm[x.dtype](
            x.data_ptr(),
            self.weight.data_ptr(),
            out.data_ptr(),
            x.numel() // width,
            width,
            self.eps,
            torch.get_num_threads(),
        )
        return out


class NativeMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), [..., H] to [..., H]."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, library: Library) -> None:
        super().__init__()
        self.library = library
        self.gate_up = join([gate, up])
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x).contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        rows = out.numel() // width
        self.library.silu_mul[x.dtype](
            gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads()
        )
        return self.down_proj(out)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parents, names and children, as they were at the first step."""
    yield from [(p, name, m) for p in model.modules() for name, m in p.named_children()]


def _norm(module: nn.Module, dtype: torch.dtype, library: Library) -> nn.Module | None:
    eps = None if isinstance(module, NativeRMSNorm) else norm_eps(module)
    if eps is None or module.weight.dtype is not dtype:
        return None
    return NativeRMSNorm(module.weight, eps, library)  # type: ignore[arg-type]


def _mlp(module: nn.Module, library: Library) -> nn.Module | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(is_plain(part) for part in parts):
        return None
    gate, up, down = parts
    if gate.weight.shape != up.weight.shape or (gate.bias is None) != (up.bias is None):  # type: ignore[union-attr]
        return None
    return NativeMLP(gate, up, down, library)  # type: ignore[arg-type]


@torch.inference_mode()
def _same(module: nn.Module, candidate: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a candidate gives what the original gives, up to rounding."""
    weight = next(candidate.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[-1], generator=generator).to(dtype)
    try:
        wanted = module(x)
    except (TypeError, RuntimeError):  # it takes something else than one tensor
        return False
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape:
        return False
    rounding = 4 * torch.finfo(dtype).eps
    error = (candidate(x).float() - wanted.float()).abs()
    return bool((error <= rounding * wanted.float().abs().max()).all())


def _embedding_weights(model: nn.Module) -> set[int]:
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


def _linear(linear: nn.Linear, library: Library | None, *, keep: bool) -> nn.Module:
    dtype, even = linear.weight.dtype, linear.in_features % 2 == 0
    if isinstance(library, Library) and library.has_linear and dtype is torch.bfloat16 and even:
        return NativeLinear(linear, library, keep=keep)
    if _mkldnn_packs(dtype):
        return MkldnnLinear(linear, keep=keep)
    return linear


def _mkldnn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype here; its operators are private to torch."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, linear = torch.ones(2, 4, dtype=dtype), nn.Linear(4, 3, dtype=dtype)
    try:
        return torch.allclose(MkldnnLinear(linear)(x), linear(x), rtol=2e-2)
    except (AttributeError, RuntimeError, TypeError):
        return False


_NAMES: dict[type, str] = {
    NativeLayer: "native layer",
    NativeLinear: "native linear",
    MkldnnLinear: "oneDNN packed linear",
    nn.Linear: "torch linear",
    NativeMLP: "native MLP",
    NativeRMSNorm: "native norm",
}


def native_level(model: nn.Module) -> str | None:
    """What multiplies bf16 in layers that were exchanged: a level of the library, None if none."""
    return next((m.library.level for m in model.modules() if isinstance(m, NativeLinear)), None)


def _describe(model: nn.Module) -> str:
    inside = {id(m) for n in model.modules() if isinstance(n, NativeLayer) for m in n.modules()}
    inside -= {id(n) for n in model.modules() if isinstance(n, NativeLayer)}
    outside = (module for module in model.modules() if id(module) not in inside)
    counts = Counter(_NAMES.get(type(module)) for module in outside)
    parts = [f"{name} ({counts[name]})" for name in _NAMES.values() if counts[name]]
    if level := native_level(model):
        parts.append(f"products by {level}")
    return ", ".join(parts)
