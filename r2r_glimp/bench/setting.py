"""What a bench runs on: the machine, the models, and engines over them."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from r2r_glimp.attention.paged import install, kv_bytes_per_token
from r2r_glimp.bench.measure import read_bandwidth
from r2r_glimp.bench.options import BenchOptions
from r2r_glimp.bench.shapes import make_model, make_pair
from r2r_glimp.core import Model, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.models.placement import resolve_device, resolve_dtype


class Setting:
    """Options resolved on this machine, and its measured bandwidth."""

    def __init__(self, options: BenchOptions) -> None:
        self.options = options
        self.device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype)
        if not isinstance(dtype, torch.dtype):
            raise UsageError("dtype=auto has no meaning for random weights: name one")
        self.dtype = dtype
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.bandwidth = read_bandwidth(self.device)
        self.paths: dict[str, str] = {}

    def pair(self, *, slm_only: bool = False) -> ModelPair:
        """Random models of the shapes; with `slm_only`, the small one in both roles."""
        o = self.options
        return make_pair(
            o.slm_shape, o.slm_shape if slm_only else o.llm_shape, self.dtype, self.device
        )

    def engine(self, pair: ModelPair, *, tokens: int, **options: Any) -> Engine:
        """An engine whose KV holds `tokens` tokens of each request of the batch, and a few more."""
        kv = self.options.batch * (tokens + 64)
        width = sum(kv_bytes_per_token(install(pair[m].model), self.dtype) for m in Model)
        engine = Engine(
            pair,
            **{
                "router": "slm",
                "kv_memory": max(kv * width, 2**24),
                "max_batch": max(32, self.options.batch),
                "prefix_cache": False,
                "kernels": self.options.kernels,
                "graphs": self.options.graphs,
                **options,
            },
        )
        self.paths = {m.label: engine.runners[m].paths for m in Model}
        return engine

    def peer(self, shape: str) -> Any:
        """A model with the same weights as the pair's, as transformers makes it."""
        model = make_model(shape, self.dtype, self.device)
        model.set_attn_implementation("sdpa")
        return model

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


def fixed_length(tokens: int) -> SamplingParams:
    """Greedy, exactly so many tokens."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
