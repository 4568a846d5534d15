"""What HTTP costs: clients of a server, against the same requests in the offline engine.

Both run the same requests with the same batch size, in turns, so that a busy machine is unfair to
neither. The clients run in this process, the server in one of its own.
"""

import asyncio
import json
import random
import re
import statistics
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from r2r_glimp.abacus.problems import problems
from r2r_glimp.bench.measure import Sample
from r2r_glimp.bench.report import Line, Report
from r2r_glimp.bench.setting import Setting
from r2r_glimp.bench.shapes import save_pair
from r2r_glimp.core import EngineError, Model, RoutingParams, SamplingParams, UsageError
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models.pair import ModelPair
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


def run_offline(engine: Engine, requests: Requests, routing: RoutingParams) -> Run:
    """The same requests in this process."""
    prompts: list[Any] = [messages for messages, _ in requests]
    samplings = [SamplingParams(max_tokens=limit, ignore_eos=True) for _, limit in requests]
    started = time.perf_counter()
    outputs = engine.generate(prompts, samplings, routing)
    elapsed = time.perf_counter() - started
    return Run(sum(len(output.token_ids) for output in outputs), elapsed)


def run(setting: Setting) -> Report:
    """A repeat is all requests; after one that warms up, the medians of `repeats` count."""
    o = setting.options
    if o.requests < 2 or o.tokens < 2:
        raise UsageError("serve needs 2 requests of 2 tokens at least: there is nothing between")
    with TemporaryDirectory() as folder:
        if o.pair is not None:
            return _serve(setting, o.pair, f"pair {o.pair}")
        setting.check_memory({o.slm_shape, o.llm_shape}, copies=2, why=", here and in the server")
        assert isinstance(setting.dtype, torch.dtype)
        preset = save_pair(o.slm_shape, o.llm_shape, setting.dtype, Path(folder))
        return _serve(setting, str(preset), f"{o.slm_shape} + {o.llm_shape}")


def _serve(setting: Setting, name: str, what: str) -> Report:
    o = setting.options
    pair = ModelPair.from_config(name, device=o.device, dtype=o.dtype)
    # No prefix cache: each pass computes everything again, here and there.
    size = {"max_batch": o.clients, "kv_memory": "256MiB", "kernels": o.kernels}
    engine = Engine(pair, prefix_cache=False, **size)  # type: ignore[arg-type]
    setting.paths = {m.label: engine.runners[m].paths for m in Model}
    requests = make_requests(o.requests, o.tokens)
    wanted: dict[str, Any] = {"router": o.router}
    if o.router == "random":
        wanted["threshold"] = o.share
    body = {"ignore_eos": True, **wanted}
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    args = {"pair": name, "device": o.device, "dtype": o.dtype, "prefix_cache": "false", **size}
    threads = {"OMP_NUM_THREADS": str(setting.machine()["threads"])}
    passes: dict[str, list[Run]] = {"offline engine": [], "streamed": [], "whole": []}
    flags = [f"--{name}={value}" for name, value in args.items()]
    with running_server(*flags, environment=threads) as server:
        for repeat in range(o.repeats + 1):
            runs = [run_offline(engine, requests, RoutingParams(**wanted))]
            for kind in (stream, body):
                runs.append(asyncio.run(run_clients(server.port, requests, kind, o.clients)))
            if repeat:  # the first one warms everything up
                for found, one in zip(passes.values(), runs, strict=True):
                    found.append(one)
    what = f"{o.requests} requests from {o.clients} clients, {what}, router {o.router}"
    return Report("serve", what, setting.machine(), setting.paths, _lines(passes))


def _lines(passes: dict[str, list[Run]]) -> list[Line]:
    offline, streamed, _ = passes.values()
    lines = []
    for name, runs in passes.items():
        pairs = zip(runs, offline, strict=True)
        ratio = statistics.median(
            (run.tokens / run.elapsed_s) / (base.tokens / base.elapsed_s) for run, base in pairs
        )
        lines.append(
            Line(
                name,
                Sample(tuple(run.elapsed_s for run in runs)),
                tokens=statistics.median(run.tokens for run in runs),
                ratios={} if runs is offline else {"the offline engine's tokens/s": ratio},
            )
        )
    for what, name in (("first_token_s", "first token"), ("between_tokens_s", "between tokens")):
        cuts = [statistics.quantiles(getattr(run, what), n=100) for run in streamed]
        for p in PERCENTILES:
            lines.append(Line(f"{name}, p{p}", Sample(tuple(one[p - 1] for one in cuts))))
    return lines
