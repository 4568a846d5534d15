"""What HTTP costs: clients against a server, and the same requests in the offline engine.

    python -m r2r_glimp.bench.serving --clients 16 --requests 64

Both run the same requests with the same batch size, in turns, so that a busy machine is unfair to
neither. The clients run in this process, the server in one of its own.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from r2r_glimp.abacus.problems import problems
from r2r_glimp.core import EngineError, RoutingParams, SamplingParams
from r2r_glimp.serve.process import running_server

_TOKEN = b'"finish_reason": null'  # in each chunk but the last; the first has no token
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
PERCENTILES = (50, 90, 99)
Requests = list[tuple[list[dict[str, str]], int]]  # messages, and how many tokens to write


@dataclass(slots=True)
class Run:
    """One pass over all requests. Times in seconds."""

    tokens: int = 0
    elapsed_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s


def make_requests(count: int, max_tokens: int) -> Requests:
    """Abacus questions, with lengths spread evenly around `max_tokens`: as in life, requests do not
    all end in the same tick."""
    rng = random.Random(0)
    return [
        (
            [{"role": "user", "content": problem.prompt()}],
            rng.randint(max_tokens // 2, 3 * max_tokens // 2),
        )
        for problem in islice(problems("test"), count)
    ]


async def run_clients(port: int, requests: Requests, body: dict[str, Any], clients: int) -> Run:
    """Send all requests from so many clients, each one after the other."""
    run, waiting = Run(), iter(requests)

    async def client() -> None:
        for messages, max_tokens in waiting:
            await _send(port, {**body, "messages": messages, "max_tokens": max_tokens}, run)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    run.elapsed_s = time.perf_counter() - started
    return run


async def _send(port: int, body: dict[str, Any], run: Run) -> None:
    """One request; plain sockets, since a comfortable client takes more time than the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    before = time.perf_counter()
    writer.write(head.encode() + content)
    is_first, answer = True, b""
    ahead = 1  # the chunk that only names the role
    while piece := await reader.read(2**16):
        now = time.perf_counter()
        answer += piece
        arrived = max(0, piece.count(_TOKEN) - ahead) if body.get("stream") else 0
        ahead = 0 if _TOKEN in piece else ahead
        if arrived and is_first:
            run.first_token_s.append(now - before)
            arrived, is_first = arrived - 1, False
        elif arrived:
            run.between_tokens_s.append(now - before)
            arrived -= 1
        run.between_tokens_s += [0.0] * arrived  # the same write brought them
        before = now
    writer.close()
    found = _USAGE.search(answer)
    if found is None:
        raise EngineError(f"the server answered {answer[:200]!r}")
    run.tokens += int(found[1])


def run_offline(engine: Any, requests: Requests, router: str) -> Run:
    """The same requests in this process."""
    prompts = [messages for messages, _ in requests]
    samplings = [SamplingParams(max_tokens=limit, ignore_eos=True) for _, limit in requests]
    started = time.perf_counter()
    outputs = engine.generate(prompts, samplings, RoutingParams(router=router))
    elapsed = time.perf_counter() - started
    return Run(sum(len(output.token_ids) for output in outputs), elapsed)


def percentiles(seconds: list[float]) -> str:
    """Milliseconds, as text."""
    cuts = statistics.quantiles(seconds, n=100)
    return ", ".join(f"p{p} {1000 * cuts[p - 1]:.1f} ms" for p in PERCENTILES)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m r2r_glimp.bench.serving", description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--router", default="entropy")
    parser.add_argument("--pair", default="abacus")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on stdout")
    options = parser.parse_args(argv)

    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.models.pair import ModelPair

    # No prefix cache: each pass computes everything again, here and there.
    size = {"max_batch": options.clients, "kv_memory": "256MiB"}
    pair = ModelPair.from_config(options.pair)
    engine = Engine(pair, router=options.router, prefix_cache=False, **size)
    requests = make_requests(options.requests, options.max_tokens)
    body = {"ignore_eos": True, "router": options.router}
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    args = [f"--{name}={value}" for name, value in size.items()]
    args += ["--pair", options.pair, "--prefix_cache", "false"]
    runs: dict[str, list[Run]] = {"offline": [], "http, streamed": [], "http, whole": []}
    with running_server(*args) as server:
        for turn in range(options.rounds + 1):
            runs["offline"].append(run_offline(engine, requests, options.router))
            for name, kind in (("http, streamed", stream), ("http, whole", body)):
                run = asyncio.run(run_clients(server.port, requests, kind, options.clients))
                runs[name].append(run)
            if turn == 0:  # the first pass warms everything up
                for passes in runs.values():
                    passes.clear()
    return _report(options, runs)


def _report(options: argparse.Namespace, runs: dict[str, list[Run]]) -> int:
    say = (lambda line: print(line, file=sys.stderr)) if options.json else print
    say(
        f"{options.requests} requests of about {options.max_tokens} tokens, "
        f"{options.clients} clients, pair {options.pair}, router {options.router}, "
        f"medians of {options.rounds} rounds"
    )
    figures: dict[str, Any] = {}
    for name, passes in runs.items():
        rate = statistics.median(run.tokens_per_s for run in passes)
        pairs = zip(passes, runs["offline"], strict=True)
        ratio = statistics.median(run.tokens_per_s / base.tokens_per_s for run, base in pairs)
        figures[name] = {"tokens_per_s": rate, "ratio": ratio}
        say(f"  {name:<15} {rate:8,.0f} tokens/s   {ratio:6.1%} of offline")
    streamed = runs["http, streamed"]
    for what in ("first_token_s", "between_tokens_s"):
        times = [t for run in streamed for t in getattr(run, what)]
        figures[what] = {p: statistics.quantiles(times, n=100)[p - 1] for p in PERCENTILES}
        say(f"  {what.removesuffix('_s').replace('_', ' '):<15} {percentiles(times)}")
    if options.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
