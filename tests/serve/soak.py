"""Soak: many clients of every kind against one server, for as long as one likes.

    python -m tests.serve.soak                  ten minutes, 64 clients
    python -m tests.serve.soak --seconds 20

Clients ask for all sorts of things, leave in the middle, are cut off, or send what is no request.
Each whole reply is compared with the offline engine's for the same request, token by token and
writer by writer. At the end nothing may be held, and memory may not have grown.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from r2r_glimp.abacus.problems import problems
from r2r_glimp.core import RequestOutput, RoutingParams, SamplingParams
from r2r_glimp.serve.process import ServerProcess, running_server

POOL = 150  # distinct requests
SETTINGS = {"pair": "abacus", "dtype": "float32", "kv_memory": "48MiB", "max_batch": "24"}
QUEUE = 24  # too few for all clients, so that some are refused
MAX_GROWTH = 32 * 2**20  # bytes of memory from the second quarter to the last
WARM_S = 120  # seconds of a run below which it only warms up: kernels for every batch shape, KV
BAD_BODIES = (
    b"", b"{", b"[]", b"\xff\xfe", b"[" * 50_000, b'{"messages": []}', b'{"messages": "hi"}',
    b'{"messages": [{"role": "user", "content": null}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "n": 0}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1000000}',
    b'{"messages": [{"role": "user", "content": "a"}], "router": "../.."}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
)  # fmt: skip


@dataclass(slots=True)
class Case:
    """A request, and what the offline engine answered."""

    path: str
    body: dict[str, Any]
    expected: list[tuple[list[int], list[str]]] = field(default_factory=list)  # ids and writers


@dataclass(slots=True)
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    memory: list[int] = field(default_factory=list)  # bytes, one a second

    def fail(self, message: str) -> None:
        self.counts["errors"] += 1
        if len(self.errors) < 20:
            self.errors.append(message)


# ---------------------------------------------------------------------- requests


def make_cases(rng: random.Random, count: int) -> list[Case]:
    """Requests of all sorts, with what the offline engine makes of them."""
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.models.pair import ModelPair

    pair = ModelPair.from_config(SETTINGS["pair"], dtype=SETTINGS["dtype"])
    engine = Engine(pair, kv_memory="64MiB", max_batch=1)
    cases = []
    for i, problem in enumerate(islice(problems("test"), count)):
        messages = [{"role": "user", "content": problem.prompt()}]
        sampling = {
            "max_tokens": rng.choice([1, 5, 30, 120]),
            "temperature": rng.choice([0, 0.6, 1.0]),
            "top_p": rng.choice([1, 0.9]),
            "top_k": rng.choice([0, 5]),
            "min_p": rng.choice([0, 0.1]),
            "stop": rng.choice([[], [], ["hence", "7"]]),
            "ignore_eos": rng.random() < 0.3,
            "n": rng.choice([1, 1, 1, 3]),
            "seed": i,
        }
        routing = {
            "router": rng.choice(["entropy", "margin", "random", "slm", "llm"]),
            "granularity": rng.choice(["token", "step"]),
            "max_llm_share": rng.choice([None, None, 0.3]),
            "answer_by": rng.choice([None, None, "slm", "llm", "router"]),
            "speculate": rng.choice([0, 0, 4]),
        }
        if routing["router"] not in ("slm", "llm"):
            routing["threshold"] = rng.choice([0.1, 0.5])
        case = Case("/v1/chat/completions", {"messages": messages})
        prompt: Any = messages
        if rng.random() < 0.3:
            prompt = engine.encode(messages).slm
            case = Case("/v1/completions", {"prompt": prompt})
        outputs = engine.generate([prompt], SamplingParams(**sampling), RoutingParams(**routing))
        case.expected = [_expect(output) for output in outputs]
        case.body |= sampling | routing
        case.body |= {"return_token_ids": True, "return_routing": True}
        if rng.random() < 0.2:
            case.body |= {"logprobs": True if "chat" in case.path else 2}
        case.body["stream"] = rng.random() < 0.5
        cases.append(case)
    return cases


def _expect(output: RequestOutput) -> tuple[list[int], list[str]]:
    return output.token_ids, list(output.sources)


def check(case: Case, answer: bytes) -> int:
    """Compare an answer with the offline engine's; returns its tokens.

    Raises:
        AssertionError: it is another's, or none.
    """
    num = len(case.expected)
    ids: list[list[int]] = [[] for _ in range(num)]
    writers: list[list[str]] = [[] for _ in range(num)]
    if case.body["stream"]:
        lines = [one[6:] for one in answer.split(b"\n\n") if one.startswith(b"data: ")]
        assert lines and lines[-1] == b"[DONE]", answer[-300:]
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    else:
        choices = json.loads(answer)["choices"]
        assert [choice["index"] for choice in choices] == list(range(num))
    for choice in choices:
        index = choice["index"]
        ids[index] += choice.get("token_ids", [])
        writers[index] += [t["source"] for t in choice.get("routing", {}).get("tokens", [])]
    for index, (tokens, sources) in enumerate(case.expected):
        assert ids[index] == tokens, f"choice {index}: {ids[index]} is not {tokens}"
        assert writers[index] == sources, f"choice {index}: written by others"
    return sum(map(len, ids))


# ---------------------------------------------------------------------- clients


async def client(
    port: int, cases: list[Case], rng: random.Random, end: float, tally: Tally
) -> None:
    """One client, one request after the other."""
    while time.monotonic() < end:
        kind = rng.choices(
            ("whole", "cancel", "cut", "bad", "half", "look"), (60, 15, 6, 10, 5, 4)
        )[0]
        try:
            case = rng.choice(cases)
            content = json.dumps(case.body).encode()
            if kind == "whole":
                await _whole(port, case, content, rng, tally)
            elif kind in ("cancel", "cut"):
                await _leave(port, case, content, rng, kind == "cut")
            elif kind == "half":
                await _leave(port, case, content, rng, True, size=rng.randrange(len(content)))
            elif kind == "bad":
                status, _ = await exchange(port, "/v1/chat/completions", rng.choice(BAD_BODIES))
                assert status in (400, 429), f"a bad body got {status}"
            else:
                status, _ = await exchange(port, rng.choice(("/health", "/metrics", "/v1/models")))
                assert status == 200, f"a look got {status}"
            tally.counts[kind] += 1
        except (AssertionError, OSError, ValueError, KeyError, TimeoutError) as error:
            tally.fail(f"{kind}: {type(error).__name__}: {error!s:.400}")


async def _whole(port: int, case: Case, content: bytes, rng: random.Random, tally: Tally) -> None:
    while True:
        status, answer = await exchange(port, case.path, content)
        if status != 429:
            break
        tally.counts["refused (429)"] += 1
        await asyncio.sleep(rng.uniform(0.05, 0.3))
    assert status == 200, f"{status} {answer[:200]!r}"
    tally.tokens += check(case, answer)


async def exchange(port: int, path: str, content: bytes | None = None) -> tuple[int, bytes]:
    """A whole answer: status and body."""
    async with asyncio.timeout(120):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_request(path, content))
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.read()
            return int(head.split()[1]), _join(body) if b"chunked" in head else body
        finally:
            writer.close()


async def _leave(
    port: int, case: Case, content: bytes, rng: random.Random, cut: bool, size: int | None = None
) -> None:
    """Begin, and go: by closing the connection, or as if the client had been killed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = _request(case.path, content)
    writer.write(request if size is None else request[: -(size + 1)])
    await writer.drain()
    if size is None and rng.random() < 0.7:
        await asyncio.wait_for(reader.read(rng.choice((1, 2000))), 120)
    await asyncio.sleep(rng.uniform(0, 0.2))
    if cut:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.close()


def _request(path: str, content: bytes | None) -> bytes:
    head = "Host: localhost\r\nConnection: close\r\n\r\n"
    if content is None:
        return f"GET {path} HTTP/1.1\r\n{head}".encode()
    size = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return f"POST {path} HTTP/1.1\r\n{size}{head}".encode() + content


def _join(chunked: bytes) -> bytes:
    parts = []
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        count = int(size, 16)
        parts.append(rest[:count])
        chunked = rest[count + 2 :]
    return b"".join(parts)


# ---------------------------------------------------------------------- the run


async def _watch_memory(pid: int, tally: Tally) -> None:
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        tally.memory.append(int(line.split()[1]) * 1024)
        await asyncio.sleep(1)


async def _run(server: ServerProcess, cases: list[Case], clients: int, seconds: float) -> Tally:
    tally = Tally()
    watch = asyncio.create_task(_watch_memory(server.process.pid, tally))
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for i in range(clients):
            group.create_task(client(server.port, cases, random.Random(i), end, tally))
    watch.cancel()
    for _ in range(100):  # what was cancelled last is let go within a tick
        _, metrics = await exchange(server.port, "/metrics")
        if b'kv_blocks{state="live"} 0.0' in metrics and b"num_requests_running 0.0" in metrics:
            break
        await asyncio.sleep(0.05)
    else:
        tally.fail("KV blocks are still live")
    if b'request_errors_total{status="5' in metrics:
        tally.fail("the server counted answers with a status from 500 on")
    status, _ = await exchange(server.port, "/health")
    if status != 200:
        tally.fail("the server is not healthy")
    return tally


def soak(seconds: float, clients: int = 64, seed: int = 0, pool: int = POOL) -> Tally:
    """Run it; what went wrong is in the tally's `errors`."""
    cases = make_cases(random.Random(seed), pool)
    args = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    with running_server(*args, "--max_queue", str(QUEUE)) as server:
        tally = asyncio.run(_run(server, cases, clients, seconds))
        code = server.stop()
        if code != 0:
            tally.fail(f"the server ended with {code}")
        loud = [line for line in server.lines if "error" in line or "Traceback" in line]
        if loud:
            tally.fail(f"the server said: {loud[0]}")
    first, last = memory_quarters(tally)
    if seconds >= WARM_S and last - first > MAX_GROWTH:
        tally.fail(f"memory grew by {(last - first) / 2**20:.0f} MiB")
    return tally


def memory_quarters(tally: Tally) -> tuple[float, float]:
    """Median memory in bytes of the second quarter (the first warms up), and of the last."""
    count = max(1, len(tally.memory) // 4)
    return statistics.median(tally.memory[count : 2 * count + 1]), statistics.median(
        tally.memory[-count:]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tally = soak(options.seconds, options.clients, options.seed)
    first, last = memory_quarters(tally)
    print(f"{options.seconds:g} s, {options.clients} clients: {dict(tally.counts)}")
    print(f"{tally.tokens:,} tokens compared with the offline engine's")
    print(f"memory {first / 2**20:.0f} MiB in the second quarter, {last / 2**20:.0f} in the last")
    for error in tally.errors:
        print(f"ERROR {error}")
    return int(bool(tally.errors))


if __name__ == "__main__":
    sys.exit(main())
