"""The compiled kernels: built once per machine into the user's cache, loaded through ctypes.

    kernels.cpp, *.h ──c++ -march=native──▶ ~/.cache/r2r_glimp/kernels-<hash>.so ──ctypes──▶ Library

The hash covers the sources, the options, the compiler and the CPU, so that a home directory shared
by different machines holds one file for each. Without a compiler there is no library, and whoever
wanted it says so.
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
from torch import Tensor

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # of -ffast-math what leaves NaN alone
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
_COMPILERS = ("c++", "g++", "clang++")
# What multiplies bf16, best first, and how the better ones are left out of a build.
_NO_TILES = ("-mno-amx-bf16", "-mno-amx-int8", "-mno-amx-tile")
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (),
    "avx512": _NO_TILES,
    "onednn": (*_NO_TILES, "-mno-avx512bf16"),
}
_PRODUCTS = ("onednn", "avx512", "amx")  # by what `products()` says
LARGE_PAGE = 2**21
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class LayerStruct(ctypes.Structure):
    """`Layer` of attention.h."""

    _fields_ = [
        *((name, c_int64) for name in ("kv_heads", "group", "head_dim", "value_dim")),
        *((name, c_int64) for name in ("num_slots", "window")),
        *((name, c_float) for name in ("scaling", "softcap")),
    ]


class BatchStruct(ctypes.Structure):
    """`Batch` of attention.h."""

    _fields_ = [
        *((name, c_int64) for name in ("num_rows", "num_threads")),
        *((name, c_void_p) for name in ("offsets", "starts", "lengths", "tables", "attended")),
    ]


class LinearStruct(ctypes.Structure):
    """`Linear` of products.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("packed", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs")),
    ]


class DecoderStruct(ctypes.Structure):
    """`Decoder` of decoder.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("norm_1", "norm_2", "q_norm", "k_norm")),
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim")),
        *((name, c_float) for name in ("eps_1", "eps_2", "q_eps", "k_eps")),
    ]


class Strided(ctypes.Structure):
    """`Strided` of attention.h: where a tensor [T, heads, D] lies."""

    _fields_ = [("data", c_void_p), ("token", c_int64), ("head", c_int64)]


_Strided = POINTER(Strided)


class Library:
    """The kernels as Python functions; pointers in, nothing out, no checks.

    Attributes:
        level: what multiplies bf16 matrices: "amx" (tiles, and vectors for few rows), "avx512"
            (vectors), or "onednn" (nothing here).
    """

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        pointer = (c_void_p,)
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
        self.use_large_pages = _typed(functions.advise_large_pages, c_void_p, c_int64)
        self.end_team = _typed(functions.end_team)
        self.read_memory = _typed(functions.read_memory, c_void_p, c_int64, c_int64)
        functions.products.restype = functions.request_tiles.restype = c_int
        self.level = _PRODUCTS[functions.products()]
        self.has_tiles = bool(functions.request_tiles())
        if self.has_linear:
            self.pack_linear = _typed(functions.pack_linear, *2 * pointer, *3 * (c_int64,))
            self.linear = _typed(functions.linear, *3 * pointer, c_int64, c_int64)
            self.run_layers = _typed(
                functions.run_layers, *4 * pointer, c_int64, *4 * pointer, c_int64
            )
            self.before_attention = _typed(
                functions.before_attention, *5 * pointer, c_int64, c_int64
            )
            self.after_attention = _typed(functions.after_attention, *4 * pointer, c_int64, c_int64)

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """So many numbers, on large pages where the system has them: for what is read from end to
        end, often."""
        spare = LARGE_PAGE // dtype.itemsize
        memory = torch.empty(-(-size // spare) * spare + spare, dtype=dtype)
        self.use_large_pages(memory.data_ptr(), memory.numel() * dtype.itemsize)
        first = -memory.data_ptr() % LARGE_PAGE // dtype.itemsize
        return memory[first : first + size]

    @property
    def has_linear(self) -> bool:
        """Whether there are bf16 products."""
        return self.level != "onednn"


@cache
def load_library(level: str = "auto") -> Library | str:
    """The kernels, compiled if this machine has not done so yet; or in words why there are none.

    Args:
        level: one of `LEVELS`, or "auto", the best this machine has.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(_COMPILERS)
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        return f"no C++ compiler ({', '.join(names)})"
    library = _load(compiler, LEVELS["amx" if level == "auto" else level])
    if isinstance(library, Library) and library.level == "amx" and not library.has_tiles:
        if level == "amx":
            return "the system gives this process no AMX tiles"
        return load_library("avx512")
    if isinstance(library, Library) and level not in ("auto", library.level):
        return f"this CPU has no {level.upper()} products of bf16"
    return library


def _load(compiler: str, without: tuple[str, ...]) -> Library | str:
    try:
        return Library(_build(compiler, without))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no reason"]
        return f"{compiler} failed: {lines[0][:200]}"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"{compiler}: {str(error)[:200]}"


def _build(compiler: str, without: tuple[str, ...]) -> Path:
    sources = [*sorted(_FOLDER.glob("*.h")), source := _FOLDER / "kernels.cpp"]
    flags = (*_FLAGS, *without)
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, text=True, timeout=60
    ).stdout
    texts = (path.read_text(encoding="utf-8") for path in sources)
    key = hashlib.sha256("\0".join([*texts, " ".join(flags), version, _cpu()]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r2r_glimp"
    path = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            command = [compiler, *flags, str(source), "-o", str(built)]
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
