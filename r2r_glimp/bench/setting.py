"""What a bench runs on: the machine, the models, and engines over them."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from r2r_glimp.attention.paged import install, kv_bytes_per_token
from r2r_glimp.bench.measure import read_bandwidth
from r2r_glimp.bench.options import BenchOptions, SimulateOptions
from r2r_glimp.bench.shapes import count_parameters, make_model, make_pair
from r2r_glimp.core import Model, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.engine.memory import free_bytes
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.models.placement import resolve_device, resolve_dtype
from r2r_glimp.models.presets import read_preset


class Setting:
    """Options resolved on this machine, and its measured bandwidth."""

    def __init__(self, options: BenchOptions, simulate: SimulateOptions | None = None) -> None:
        self.options = options
        self.simulate = simulate or SimulateOptions()
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype)
        if options.pair is None and not isinstance(self.dtype, torch.dtype):
            raise UsageError("dtype=auto has no meaning for random weights: name one")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.bandwidth = read_bandwidth(self.device)
        self.paths: dict[str, str] = {}

    def name(self, model: Model) -> str:
        """What a model is called."""
        o = self.options
        return (o.slm_shape, o.llm_shape)[model] if o.pair is None else f"{model.name} of {o.pair}"

    def pair(self, *, slm_only: bool = False) -> ModelPair:
        """The pair; with `slm_only`, the small one in both roles.

        Raises:
            UsageError: it is more than the device's memory.
        """
        o = self.options
        if o.pair is not None:
            preset = read_preset(o.pair)
            names = ("", "_adapters")
            both = {f"llm{n}": preset[f"slm{n}"] for n in names if f"slm{n}" in preset}
            asked = {"device": o.device, "dtype": o.dtype}
            return ModelPair.from_config(o.pair, **asked, **(both if slm_only else {}))
        assert isinstance(self.dtype, torch.dtype)
        shapes = {o.slm_shape} if slm_only else {o.slm_shape, o.llm_shape}
        if o.no_peers:
            self.check_memory(shapes)
        else:
            self.check_memory(shapes, 2, ", as much again for the peers (--no_peers)")
        return make_pair(
            o.slm_shape, o.slm_shape if slm_only else o.llm_shape, self.dtype, self.device
        )

    def check_memory(self, shapes: set[str], copies: int = 1, why: str = "") -> None:
        """Raises UsageError if so many copies of random weights do not fit the device."""
        assert isinstance(self.dtype, torch.dtype)
        needed = sum(count_parameters(shape) for shape in shapes) * self.dtype.itemsize
        if copies * needed > (free := free_bytes(self.device)):
            raise UsageError(
                f"{' and '.join(sorted(shapes))} in {self.options.dtype} take {_gib(needed)}{why}, "
                f"and {_gib(free)} are free: take smaller shapes"
            )

    def engine(self, pair: ModelPair, *, tokens: int, **options: Any) -> Engine:
        """An engine whose KV holds `tokens` tokens of each request of the batch, and a few more.

        Raises:
            UsageError: they do not fit; it says how many requests do.
        """
        o = self.options
        each, free = (tokens + 64) * kv_width(pair), free_bytes(self.device)
        if o.batch * each > free:
            raise UsageError(
                f"the KV of {o.batch:,} requests of {tokens:,} tokens takes {_gib(o.batch * each)} "
                f"and {_gib(free)} are free: --batch {free // each:,} fits"
            )
        engine = Engine(
            pair,
            **{
                "router": "slm",
                "kv_memory": max(o.batch * each, 2**24),
                "max_batch": max(32, o.batch),
                "prefix_cache": False,
                "kernels": o.kernels,
                "graphs": o.graphs,
                **options,
            },
        )
        self.paths = {m.label: engine.runners[m].paths for m in Model}
        return engine

    def peer(self, model: Model) -> Any:
        """A model with the same weights as the pair's, as transformers makes it."""
        o = self.options
        if o.pair is not None:
            peer = self.pair(slm_only=model is Model.SLM)[model].model
        else:
            assert isinstance(self.dtype, torch.dtype)
            peer = make_model((o.slm_shape, o.llm_shape)[model], self.dtype, self.device)
        peer.set_attn_implementation("sdpa")
        return peer

    def machine(self) -> dict[str, Any]:
        """What this ran on."""
        return {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(self.device)
            if self.device.type == "cpu"
            else torch.cuda.get_device_name(self.device),
            "dtype": self.options.dtype,
            "read_bandwidth": self.bandwidth,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }


def kv_width(pair: ModelPair) -> int:
    """Bytes of KV of a token, in the models that are here."""
    models = [pair[m].model for m in pair.local]
    return sum(kv_bytes_per_token(install(model), model.dtype) for model in models)


def fixed_length(tokens: int) -> SamplingParams:
    """Greedy, exactly so many tokens."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
