"""A server in this process, over the babbling pair, so that faults can be put into its engine."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch

from r2r_glimp.core import RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.drift import Traffic
from r2r_glimp.routing.features import FeatureSpec
from r2r_glimp.routing.mlp import MLPConfig, MLPRouter, MLPRouterNet, MLPSize, Threshold
from r2r_glimp.serve.app import create_app
from r2r_glimp.serve.auth import Keys
from r2r_glimp.serve.catalog import Catalog
from r2r_glimp.serve.limits import Limits, Slots
from r2r_glimp.serve.metrics import Metrics
from r2r_glimp.serve.server import Server, open_socket
from r2r_glimp.serve.service import Service
from r2r_glimp.serve.worker import Worker
from tests.engine.conftest import make_pair, words  # noqa: F401

HELLO = [{"role": "user", "content": "Cups hats 4"}]


@dataclass
class Live:
    """A server that runs in a thread."""

    worker: Worker
    service: Service
    port: int
    server: Server
    thread: threading.Thread
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", **{"messages": HELLO, "max_tokens": 8, **body})

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", **{"prompt": "Cups", "max_tokens": 8, **body})

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def events(self, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
        """A stream's chunks, `"[DONE]"` for the last."""
        body = {"messages": HELLO, "max_tokens": 8, "stream": True, **body}
        if path == "/v1/completions":
            body.pop("messages")
        with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        return [one if (one := line[6:]) == "[DONE]" else json.loads(one) for line in lines]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def metric(self, name: str) -> float:
        """A sample's value; `name` with its labels."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"r2r_glimp:{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def wait_idle(self, timeout_s: float = 10) -> None:
        """Wait until nothing runs, and look that nothing is held."""
        eventually(lambda: not self.worker.engine.has_work, timeout_s)
        eventually(lambda: self.service.slots.taken == 0, timeout_s)
        eventually(lambda: not self.worker.open and not self.worker._tickets, timeout_s)
        self.worker.engine.check_integrity()
        engine = self.worker.engine
        assert all(pool.num_free == engine.kv.num_blocks for pool in engine.kv.pools)

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(20)


def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.005)


def start(
    pair: ModelPair,
    *,
    router: Any = "random",
    trained: Any = None,
    keys: tuple[str, ...] = (),
    queue: int = 64,
    stall_s: float = 60.0,
    deadline_s: float = 60.0,
    body_timeout_s: float = 30.0,
    max_tokens: int = 64,
    **engine_options: Any,
) -> Live:
    """A running server."""
    engine = Engine(pair, router=router, **{"kv_memory": "4MiB", "max_batch": 16, **engine_options})
    worker = Worker(engine, Metrics(), stall_s=stall_s)
    service = Service(
        worker,
        Catalog(engine, RoutingParams(), trained=trained),
        SamplingParams(max_tokens=max_tokens),
        Slots(engine.scheduler.max_batch + queue),
        deadline_s=deadline_s,
    )
    limits = Limits(Keys(list(keys)), max_body=2**20, body_timeout_s=body_timeout_s)
    server = Server(create_app(service, limits), worker, drain_s=5)
    sock = open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    return Live(worker, service, sock.getsockname()[1], server, thread)


def make_router(granularity: Any = "token", traffic: Traffic | None = None) -> MLPRouter:
    """A trained router of random weights, with a calibration."""
    features = FeatureSpec(hidden_size=32, top_k_logits=4)
    config = MLPConfig(granularity=granularity, features=features, size=MLPSize(width=4, blocks=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLPRouterNet(config)
    threshold = Threshold(value=0.25, calibrated_on="nothing", llm_share=0.1)
    curve = [(0.0, 1.0), (0.2, 0.5), (0.6, 0.1)]
    return MLPRouter(net, {"share-0.1": threshold}, "share-0.1", None, curve, traffic)


@pytest.fixture
def serve(make_pair: Callable[[], ModelPair]) -> Iterator[Callable[..., Live]]:  # noqa: F811
    """`serve(stall_s=0.1)`: a server of its own."""
    running: list[Live] = []

    def make(**options: Any) -> Live:
        running.append(start(make_pair(), **options))
        return running[-1]

    yield make
    for live in running:
        live.stop()


@pytest.fixture(scope="module")
def live(make_pair: Callable[[], ModelPair]) -> Iterator[Live]:  # noqa: F811
    """One server for tests that leave it as it was, with a trained router for tokens."""
    server = start(make_pair(), trained={"token": make_router()})
    yield server
    server.wait_idle()
    assert server.worker.health == "ok"
    server.stop()
