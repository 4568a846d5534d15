"""How much faster than the plain way, with the same labels: `python -m labeling.benchmark`.

Both label the same questions in this process, one after the other, with the same number of
threads. The plain way is `labeling.reference`: Hugging Face `generate`, one branch at a time.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROG = "python -m labeling.benchmark"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a label differs."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("--pair", default="abacus", help="a pair's name or YAML file")
    parser.add_argument("--questions", type=int, default=128, help="labeled in both ways")
    parser.add_argument("--max_batch", type=int, default=128, help="sequences that run at once")
    parser.add_argument("--max_tokens", type=int, default=256, help="of responses and branches")
    parser.add_argument("--draft", type=int, default=64, help="of the answer's own text; 0: none")
    parser.add_argument("--granularity", choices=("token", "both"), default="both")
    text = "bfloat16 rounds so coarsely that near-ties fall either way in any two programs"
    parser.add_argument("--dtype", default="float32", help=text)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    result = compare_ways(args)
    print(render(result), file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    return int(result["different_labels"] > 0)


def compare_ways(args: argparse.Namespace) -> dict[str, Any]:
    """Label the same questions in both ways; seconds, tokens and differences."""
    import datasets  # noqa: F401 - its import is nobody's labeling
    import torch

    from labeling.answers import final_abacus
    from labeling.config import LabelingConfig
    from labeling.reference import PlainLabeler
    from labeling.run import run
    from labeling.sections import BranchConfig, EngineConfig, ResponseConfig, SourceConfig
    from labeling.sources import load_questions
    from r2r_glimp.models import ModelPair

    torch.set_num_threads(args.threads)
    source = SourceConfig(count=args.questions, split="validation", seed=1)
    questions = load_questions(source)
    pairs = [ModelPair.from_config(args.pair, device="cpu", dtype=args.dtype) for _ in range(2)]

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        config = LabelingConfig(
            out=str(out),
            source=source,
            granularity=args.granularity,
            responses=ResponseConfig(max_tokens=args.max_tokens),
            branches=BranchConfig(max_tokens=args.max_tokens),
            engine=EngineConfig(kv_memory="512MiB", max_batch=args.max_batch, draft=args.draft),
            shard_size=args.questions,
        )
        clock = _Clock()
        run(config, pairs[0])
        seconds, cpu_seconds = clock.read()
        rows = read_rows(out)
        info = json.loads((out / "info.json").read_bytes())

    plain = PlainLabeler(
        pairs[1].slm.model,
        pairs[1].llm.model,
        pairs[1].slm.tokenizer,
        final_abacus,
        max_tokens=args.max_tokens,
    )
    clock = _Clock()
    labels = {q.id: plain.label(q.prompt, steps=args.granularity == "both") for q in questions}
    plain_seconds, plain_cpu_seconds = clock.read()

    compared = different = 0
    for id, one in labels.items():
        if one is None:  # dropped by the plain way
            different += len(rows.get(id, {}))
            continue
        wanted = zip(one.tokens, one.candidates, one.labels, one.step_labels, strict=True)
        compared += len(one.tokens)
        different += sum(rows.get(id, {}).get(p) != row for p, row in enumerate(wanted))
    counts = info["counts"]
    return {
        "questions": args.questions,
        "granularity": args.granularity,
        "dtype": args.dtype,
        "threads": args.threads,
        "compared_labels": compared,
        "different_labels": different,
        "branches": counts.get("token_forks", 0) + counts.get("step_forks", 0),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "plain_seconds": round(plain_seconds, 2),
        "plain_cpu_seconds": round(plain_cpu_seconds, 2),
        "plain_tokens_written": sum(one.num_written for one in labels.values() if one),
        "times_faster": round(plain_seconds / seconds, 1),
        "times_less_cpu": round(plain_cpu_seconds / cpu_seconds, 1),
        "stages": info["seconds"],
    }


def read_rows(out: Path) -> dict[str, dict[int, tuple[int, int, int, int]]]:
    """Token, candidate, label and step label by question and position, of a finished run."""
    import datasets

    found: dict[str, dict[int, tuple[int, int, int, int]]] = {}
    columns = ["question_id", "position", "token", "slm_token", "label", "step_label"]
    for row in datasets.load_from_disk(str(out / "dataset")).select_columns(columns):
        values = (row["token"], row["slm_token"], row["label"], row["step_label"])
        found.setdefault(row["question_id"], {})[row["position"]] = values
    return found


def render(result: dict[str, Any]) -> str:
    """The figures for people."""
    r = result
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in r["stages"].items())
    return "\n".join(
        [
            f"{r['questions']} questions, granularity {r['granularity']}, {r['branches']} branches,"
            f" {r['dtype']}, {r['threads']} thread(s)",
            f"plain loop  {r['plain_seconds']:8.2f} s  ({r['plain_cpu_seconds']:.2f} s of CPU, "
            f"{r['plain_tokens_written']:,} tokens written)",
            f"labeling    {r['seconds']:8.2f} s  ({r['cpu_seconds']:.2f} s of CPU; {stages})",
            f"ratio       {r['times_faster']:8.1f}    ({r['times_less_cpu']:.1f} by CPU time)",
            f"labels      {r['different_labels']} of {r['compared_labels']} differ",
        ]
    )


class _Clock:
    """Seconds of wall clock and of this process since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        wall, cpu = self._started
        return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    sys.exit(main())
