"""`r2r-glimp serve`: the pair behind OpenAI's HTTP protocol.

Options of sampling and routing are what holds where a request says nothing. API keys come from
--api_key_file or the environment variable R2R_GLIMP_API_KEYS; without any, everybody who reaches
the port may use it.
"""

import asyncio
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from r2r_glimp.cli.errors import say
from r2r_glimp.cli.options import (
    add_shared_options,
    default_router,
    load_engine,
    make_router,
    read_params,
)
from r2r_glimp.cli.parser import Parser, pick
from r2r_glimp.core import Granularity, RoutingParams, SamplingParams, UsageError

if TYPE_CHECKING:
    from r2r_glimp.engine.engine import Engine
    from r2r_glimp.routing.routers import Router

EXAMPLES = (
    "",
    "--port 8080 --granularity step --router entropy --threshold 0.5",
    "--pair qwen3-0.6b-8b --device cuda --kv_memory 40GiB --max_batch 128",
    "--host 0.0.0.0 --api_key_file keys.txt",
)
_LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How the server runs.

    Args:
        host: address to listen on; others than this machine's own reach it with 0.0.0.0.
        port: port to listen on; 0 takes a free one and says which.
        served_name: what clients call the pair; its models are NAME:slm and NAME:llm.
        api_key_file: file with the keys that are let in, one a line.
        open_metrics: /metrics needs no key.
        max_queue: completions that may wait beside those that run; more are refused (429).
        deadline: seconds after which a request is ended.
        drain: seconds that requests have to finish after SIGTERM.
        stall: seconds a tick may take before /health says that the engine is stalled.
        max_body: bytes a request's body may have, such as 4MiB.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str = "pair"
    api_key_file: str | None = None
    open_metrics: bool = False
    max_queue: int = 256
    deadline: float = 600.0
    drain: float = 30.0
    stall: float = 120.0
    max_body: str | int = "4MiB"

    def __post_init__(self) -> None:
        for name, least in (("max_queue", 0), ("drain", 0), ("deadline", 0.001), ("stall", 0.001)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise UsageError(f"--{name} {value} is out of range: {least} or more")
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port {self.port} is out of range: 0 to 65535")
        if not self.served_name or ":" in self.served_name:
            raise UsageError(f"--served_name {self.served_name!r}: give a name without a colon")


def build_parser() -> Parser:
    """The options of this verb."""
    parser = Parser("serve", "[options]", __doc__ or "", EXAMPLES)
    parser.add_config()
    parser.add_fields(parser.add_argument_group("server"), ServeOptions)
    add_shared_options(parser)
    return parser


def run(argv: list[str]) -> int:
    """The verb; returns 0 after a signal and a drain."""
    options = build_parser().parse(argv)
    sampling, routing = read_params(options)
    _check(sampling, routing)
    serving = pick(ServeOptions, options)
    try:
        from r2r_glimp.serve.server import Server, allow_many_files, open_socket
    except ImportError as error:
        raise UsageError(
            f"serving needs packages that are not here ({error.name}): "
            "pip install 'r2r_glimp[serve]'"
        ) from None
    from r2r_glimp.engine.memory import parse_bytes
    from r2r_glimp.serve.app import create_app
    from r2r_glimp.serve.auth import read_keys
    from r2r_glimp.serve.catalog import Catalog
    from r2r_glimp.serve.limits import OPEN_PATHS, Limits, Slots
    from r2r_glimp.serve.metrics import Metrics
    from r2r_glimp.serve.service import Service
    from r2r_glimp.serve.worker import Worker

    keys = read_keys(serving.api_key_file)
    limits = Limits(
        keys,
        max_body=parse_bytes(serving.max_body),
        open_paths=OPEN_PATHS | ({"/metrics"} if serving.open_metrics else set()),
    )
    sock = open_socket(serving.host, serving.port)  # before the models: they take long to load
    try:
        engine = load_engine(options)
        trained = _trained_routers(options, engine)
        catalog = Catalog(engine, routing, name=serving.served_name, trained=trained)
        worker = Worker(engine, Metrics(), stall_s=serving.stall)
        slots = Slots(options.max_batch + serving.max_queue)
        service = Service(worker, catalog, sampling, slots, deadline_s=serving.deadline)
        allow_many_files()
        # The engine takes the interpreter back after every kernel; it shall not wait 5 ms for it.
        sys.setswitchinterval(0.0005)
        server = Server(create_app(service, limits), worker, drain_s=serving.drain)
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # clients' garbage fills no log
        if not keys and serving.host not in _LOCAL:
            say("warning", f"{serving.host} is open to everybody who reaches it: there are no keys")
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join(model.id for model in catalog.models)
        if engine.router.granularity is not None and not catalog.is_watched:
            say("info", "drift is not watched: the router was not calibrated for these options")
        say("serving", f"http://{shown}:{port}/v1, models {names}")
        asyncio.run(server.serve([sock]))
    finally:
        sock.close()
    return 0


def _check(sampling: SamplingParams, routing: RoutingParams) -> None:
    for name, given in (
        ("n", sampling.n > 1),
        ("logprobs", sampling.logprobs is not None),
        ("seed", sampling.seed is not None),
        ("trace", routing.trace),
    ):
        if given:
            raise UsageError(f"--{name} is for generate; clients of the server say it per request")


def _trained_routers(options: Namespace, engine: "Engine") -> "dict[Granularity, Router]":
    """The trained routers beside the bundled pair that are not the default one."""
    granularities: tuple[Granularity, ...] = ("token", "step")
    names = {g: default_router(options, g) for g in granularities}
    return {
        g: make_router(name)
        for g, name in names.items()
        if name != "entropy" and engine.router.granularity != g
    }
