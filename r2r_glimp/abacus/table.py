"""How routing pays on the bundled pair: `python -m r2r_glimp.abacus.table`.

Greedy accuracy on held-out problems for each model alone, for entropy routing at several LLM
shares, and for random routing at equal shares. Thresholds are found on validation problems, figures
are of test problems.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from r2r_glimp.abacus.problems import Problem, Split, is_correct, problems
from r2r_glimp.core import Granularity, RoutingParams, SamplingParams
from r2r_glimp.engine.engine import Engine
from r2r_glimp.models import ModelPair
from r2r_glimp.routing.calibration import find_threshold

SHARES = (0.1, 0.2, 0.4)
RANGES = {"entropy": (0.0, 3.0), "random": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one sample of problems; `low` and `high` bound the accuracy (Wilson, 95%)."""

    system: str
    granularity: str
    threshold: float | None
    problems: int
    accuracy: float
    low: float
    high: float
    llm_share: float
    switches: float
    tokens_per_s: float


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson score interval of a proportion."""
    p, scale = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / scale
    return centre - half, centre + half


def sample(split: Split, count: int) -> list[Problem]:
    """Distinct problems of a split, levels in equal parts."""
    return list(islice(dict.fromkeys(islice(problems(split), 2 * count)), count))


def measure(engine: Engine, questions: list[Problem], routing: RoutingParams) -> Row:
    """Run one system over all questions at once."""
    prompts = [[{"role": "user", "content": question.prompt()}] for question in questions]
    started = time.monotonic()
    # A seed of its own for each question: the random router draws from it.
    sampling = [SamplingParams(max_tokens=200, seed=seed) for seed in range(len(questions))]
    outputs = engine.generate(prompts, sampling, routing)  # type: ignore[arg-type]
    elapsed_s = time.monotonic() - started
    right = sum(is_correct(q, o.text) for q, o in zip(questions, outputs, strict=True))
    tokens = sum(len(o.token_ids) for o in outputs)
    low, high = wilson(right, len(questions))
    return Row(
        system=str(routing.router),
        granularity=routing.granularity or "-",
        threshold=routing.threshold,
        problems=len(questions),
        accuracy=right / len(questions),
        low=low,
        high=high,
        llm_share=sum(o.stats.llm_tokens for o in outputs) / tokens,
        switches=sum(o.stats.switches for o in outputs) / len(outputs),
        tokens_per_s=tokens / elapsed_s,
    )


def routing_for(router: str, granularity: Granularity, threshold: float | None) -> RoutingParams:
    # The router decides on the answer too: at small shares there is no room for an answer that is
    # always the LLM's.
    return RoutingParams(
        router=router, granularity=granularity, threshold=threshold, answer_by="router"
    )


def rows(engine: Engine, count: int, calibration: int) -> Iterator[Row]:
    """Every row of the table, as it is measured."""
    questions, tuning = sample("test", count), sample("validation", calibration)
    for router in ("slm", "llm"):
        yield measure(engine, questions, RoutingParams(router=router))
    granularities: tuple[Granularity, ...] = ("token", "step")
    for granularity in granularities:
        for router, (low, high) in RANGES.items():
            for share in SHARES:
                threshold, _ = find_threshold(
                    lambda t, r=router, g=granularity: (
                        measure(engine, tuning, routing_for(r, g, t)).llm_share
                    ),  # type: ignore[misc]
                    share,
                    low=low,
                    high=high,
                    rising=router == "random",
                    tolerance=0.05,
                )
                yield measure(engine, questions, routing_for(router, granularity, threshold))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m r2r_glimp.abacus.table", description=__doc__)
    parser.add_argument("--problems", type=int, default=1000, help="held-out problems (1000)")
    parser.add_argument(
        "--calibration", type=int, default=200, help="validation problems a threshold is found on"
    )
    parser.add_argument("--pair", default="abacus", help="name or path of a pair preset")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    engine = Engine(ModelPair.from_config(args.pair), kv_memory="256MiB", max_batch=64)
    if not args.json:
        print(
            "| system | granularity | threshold | accuracy (95%) | LLM share | switches "
            "| tokens/s |"
        )
        print("|---|---|---|---|---|---|---|")
    for row in rows(engine, args.problems, args.calibration):
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        threshold = "" if row.threshold is None else f"{row.threshold:.3f}"
        print(
            f"| {row.system} | {row.granularity} | {threshold} | {row.accuracy:.1%} "
            f"({row.low:.1%} to {row.high:.1%}) | {row.llm_share:.1%} | {row.switches:.1f} "
            f"| {row.tokens_per_s:,.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
