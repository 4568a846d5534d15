"""Drift, measured: the bundled token router's monitor on requests like its calibration's, and on
others.

    python -m tests.serve.drift                 20 runs of 500 requests, some minutes
"""

import argparse
import random
from collections.abc import Iterable, Iterator
from itertools import islice

from r2r_glimp.abacus.problems import problems
from r2r_glimp.core import FinishEvent, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.hub import load_router
from r2r_glimp.models.pair import ModelPair
from r2r_glimp.routing.drift import DriftMonitor

ROUTER = "checkpoints/abacus-token-router"
AT_ONCE = 64


def like_calibration(seed: int) -> Iterator[str]:
    """Problems that nothing was calibrated on."""
    return (problem.prompt() for problem in problems("validation", 1000 + seed))


def recitals() -> Iterator[str]:
    """Another exercise of the same world."""
    return (p.recital(random.Random(i))[0] for i, p in enumerate(problems("validation", 8)))


def prose() -> Iterator[str]:
    """Nothing of that world."""
    rng = random.Random(3)
    begun = ("What is the capital of", "Tell me about", "Explain", "Write a poem on", "Describe")
    about = ("hats", "the sea", "a long winter", "my neighbour", "trains", "the moon", "old books")
    while True:
        yield f"{rng.choice(begun)} {rng.choice(about)} and {rng.choice(about)}, please."


def make_engine() -> Engine:
    """The bundled pair and its token router."""
    pair = ModelPair.from_config("abacus")
    return Engine(pair, router=load_router(ROUTER), kv_memory="128MiB", max_batch=AT_ONCE)


def watch(engine: Engine, monitor: DriftMonitor, texts: Iterable[str], count: int) -> int | None:
    """Route texts; which of them is the first that something drifts after, if there is one."""
    sampling, waiting = SamplingParams(max_tokens=200), islice(texts, count)
    first = None
    for text in islice(waiting, AT_ONCE):
        engine.add_request([{"role": "user", "content": text}], sampling, RoutingParams())
    begun = monitor.num_requests
    while engine.has_work:
        for event in engine.step():
            if not isinstance(event, FinishEvent):
                if event.score is not None:
                    monitor.count(event.request_id, event.score)
                continue
            monitor.finish(event.request_id, event.output.stats.llm_share)
            if first is None and monitor.drifting:
                first = monitor.num_requests - begun
            for text in islice(waiting, 1):
                engine.add_request([{"role": "user", "content": text}], sampling, RoutingParams())
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    engine = make_engine()
    traffic = engine.router.traffic
    assert traffic is not None
    alarms = 0
    for seed in range(options.runs):
        monitor = DriftMonitor(traffic)
        alarms += watch(engine, monitor, like_calibration(seed), options.requests) is not None
    print(f"{options.runs} runs of {options.requests} requests like calibration's: {alarms} alarms")
    for name, texts in (("recitals", recitals()), ("prose", prose())):
        monitor = DriftMonitor(traffic)
        print(f"{name}: after {watch(engine, monitor, texts, 300)} requests")


if __name__ == "__main__":
    main()
