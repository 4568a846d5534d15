"""`r2r-glimp env`: what this machine has, for bug reports and for choosing a pair."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from r2r_glimp import __version__
from r2r_glimp.cli.parser import Parser
from r2r_glimp.cli.render import aligned, format_bytes

PACKAGES = (
    "torch transformers tokenizers safetensors huggingface-hub datasets jsonargparse numpy "
    "lightning torchmetrics wandb peft ray fastapi triton"
).split()


def run(argv: list[str]) -> int:
    """The verb."""
    parser = Parser("env", "[--json]", __doc__ or "", ("", "--json"))
    parser.add_flag(parser, "json", "one JSON object on stdout")
    options = parser.parse(argv)
    facts = collect()
    if options.json:
        print(json.dumps(facts))
        return 0
    for section, values in facts.items():
        print(section)
        print(
            aligned(
                [(name, "-" if value is None else value) for name, value in values.items()],
                indent=2,
            )
        )
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything, as plain values; None for what is not there or cannot be told."""
    return {
        "software": {
            "r2r_glimp": __version__,
            "git": git_revision(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cpu": _cpu(),
        "gpu": _gpu(),
        "settings": {
            name: os.environ.get(name)
            for name in ("HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
        },
    }


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, `+changes` if files differ; else None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        sha, changes = (
            subprocess.run(
                ["git", "-C", str(root), *args],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout
            for args in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return sha.strip() + ("+changes" if changes.strip() else "")


def _cpu() -> dict[str, Any]:
    import torch

    model, flags = _cpuinfo()
    total, available = _memory()
    return {
        "model": model,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory": total and format_bytes(total),
        "memory_available": available and format_bytes(available),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        # bfloat16 runs on any CPU; without these it is slow.
        "bf16_instructions": " ".join(f for f in ("avx512_bf16", "amx_bf16", "bf16") if f in flags)
        or None,
    }


def _gpu() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"cuda": torch.version.cuda, "devices": torch.cuda.device_count()}
    if torch.cuda.is_available():
        facts["bf16"] = torch.cuda.is_bf16_supported()
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory, kind = format_bytes(device.total_memory), f"sm_{device.major}{device.minor}"
            facts[f"cuda:{index}"] = f"{device.name}, {memory}, {kind}"
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> tuple[str | None, set[str]]:
    """Name and feature flags of the CPU, as far as Linux tells."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or None, set(flags.split())


def _memory() -> tuple[int | None, int | None]:
    """Bytes of main memory in all and to be had, as far as Linux tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    sizes = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
    }
    return sizes.get("MemTotal"), sizes.get("MemAvailable")
