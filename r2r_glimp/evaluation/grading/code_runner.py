"""Runs as a process: a program that a model wrote, under limits.

    python -I code_runner.py LIMITS-AS-JSON        in a folder of its own: program.py, result.json

CPU time, memory, the size of files and their number are bounded, and no process or thread can be
started. As root it becomes `nobody` first: limits on processes do not bind root. Where the system
lets it, there is no network. This keeps accidents small; it is no sandbox for an attacker.
"""

import ctypes
import json
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any

_NOBODY = 65534
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
# What programs of the benchmark take for granted.
_PRELUDE = "\n".join(
    [
        *(
            f"from {name} import *"
            for name in "string re datetime collections heapq bisect copy math random statistics "
            "itertools functools operator io sys json builtins typing".split()
        ),
        "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics",
        "import itertools, functools, operator, io, sys, json, typing",
        "",
    ]
)


def main() -> None:
    """Limit this process, then become the program."""
    limits = json.loads(sys.argv[1])
    source = _PRELUDE + Path("program.py").read_text(encoding="utf-8")
    code = compile(source, "program.py", "exec")
    _leave_network()
    _restrict(limits)
    threading.Thread.start = threading.Thread.run  # type: ignore[method-assign]
    threading.Thread.join = lambda self, timeout=None: None  # type: ignore[method-assign]
    sys.setrecursionlimit(50_000)
    names: dict[str, Any] = {"__name__": "__main__" if limits["function"] is None else "program"}
    exec(code, names)  # noqa: S102
    if limits["function"] is not None:
        call = getattr(names["Solution"](), limits["function"])
        result = call(*(json.loads(line) for line in sys.stdin.read().split("\n") if line.strip()))
        Path("result.json").write_text(json.dumps(result, default=list), encoding="utf-8")


def _leave_network() -> None:
    unshare = ctypes.CDLL(None).unshare
    unshare(_NEW_NETWORK if os.getuid() == 0 else _NEW_USER | _NEW_NETWORK)


def _restrict(limits: dict[str, Any]) -> None:
    seconds, memory = limits["cpu_s"], limits["memory"]
    if os.getuid() == 0:
        os.chown(".", _NOBODY, _NOBODY)
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
