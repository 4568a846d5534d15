"""The compiled kernels: built once per machine into the user's cache, loaded through ctypes.

    kernels.cpp ──c++ -march=native──▶ ~/.cache/r2r_glimp/kernels-<hash>.so ──ctypes──▶ Library

The hash covers the source, the compiler and the CPU, so that a home directory shared by different
machines holds one file for each. Without a compiler there is no library, and whoever wanted it says
so.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # of -ffast-math what leaves NaN alone
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
_COMPILERS = ("c++", "g++", "clang++")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class LayerStruct(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("kv_heads", "group", "head_dim", "value_dim")),
        *((name, c_int64) for name in ("num_slots", "window")),
        *((name, c_float) for name in ("scaling", "softcap")),
    ]


class BatchStruct(ctypes.Structure):
    """`Batch` of kernels.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("num_rows", "num_threads")),
        *((name, c_void_p) for name in ("offsets", "starts", "lengths", "tables", "attended")),
    ]


class DecoderStruct(ctypes.Structure):
    """`Decoder` of kernels.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("norm_1", "norm_2", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("qkv", "qkv_bias", "o", "o_bias")),
        *((name, c_void_p) for name in ("gate_up", "gate_up_bias", "down", "down_bias")),
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner")),
        *((name, c_float) for name in ("eps_1", "eps_2", "q_eps", "k_eps")),
    ]


class Strided(ctypes.Structure):
    """`Strided` of kernels.cpp: where a tensor [T, heads, D] lies."""

    _fields_ = [("data", c_void_p), ("token", c_int64), ("head", c_int64)]


_Strided = POINTER(Strided)


class Library:
    """The kernels as Python functions; pointers in, nothing out, no checks."""

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        self.attend = {
            dtype: _typed(
                functions[f"attend_{suffix}"],
                *(POINTER(LayerStruct), POINTER(BatchStruct), c_void_p, c_void_p),
                *(_Strided, _Strided, _Strided, c_void_p, c_void_p),
            )
            for dtype, suffix in SUFFIXES.items()
        }
        self.rms_norm = {
            dtype: _typed(
                functions[f"rms_norm_{suffix}"],
                *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int64),
            )
            for dtype, suffix in SUFFIXES.items()
        }
        self.silu_mul = {
            dtype: _typed(
                functions[f"silu_mul_{suffix}"], c_void_p, c_void_p, c_int64, c_int64, c_int64
            )
            for dtype, suffix in SUFFIXES.items()
        }
        functions.has_linear.restype = c_int
        self.has_linear = bool(functions.has_linear())
        if self.has_linear:
            self.pack_linear = _typed(functions.pack_linear, c_void_p, c_void_p, c_int64, c_int64)
            pointers, sizes = (c_void_p,) * 4, (c_int64,) * 4
            self.linear = _typed(functions.linear, *pointers, *sizes)
            decoder = POINTER(DecoderStruct)
            self.before_attention = _typed(
                functions.before_attention, decoder, *pointers, c_int64, c_int64
            )
            self.after_attention = _typed(
                functions.after_attention, decoder, *pointers[1:], c_int64, c_int64
            )


@cache
def load_library() -> Library | str:
    """The kernels, compiled if this machine has not done so yet; or in words why there are none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(names)})"
    try:
        return Library(_build(compiler))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no reason"]
        return f"{compiler} failed: {lines[0][:200]}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"{compiler}: {str(error)[:200]}"


def _build(compiler: str) -> Path:
    source = _SOURCE.read_text(encoding="utf-8")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, text=True, timeout=60
    ).stdout
    key = hashlib.sha256("\0".join([source, " ".join(_FLAGS), version, _cpu()]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r2r_glimp"
    path = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=300)
            built.replace(path)  # whole or not at all: other processes may be building it too
    return path


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _typed(function: "ctypes._NamedFuncPointer", *arguments: type) -> "ctypes._NamedFuncPointer":
    function.argtypes = arguments
    function.restype = None
    return function
