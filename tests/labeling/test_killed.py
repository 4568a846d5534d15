"""kill -9 at any moment, then the same command again: the same bytes as an undisturbed run."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from labeling.__main__ import main
from labeling.config import LabelingConfig
from labeling.run import run
from labeling.sections import SourceConfig
from r2r_glimp.models import ModelPair
from tests.labeling.test_shards import contents

ROOT = Path(__file__).parents[2]


def label_in_a_child(config: LabelingConfig, pair: ModelPair, seconds: float | None) -> bool:
    """Run in a forked process, killed after a while; whether it came to its end."""
    child = multiprocessing.get_context("fork").Process(target=run, args=(config, pair))
    child.start()
    child.join(seconds)
    if child.is_alive():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return False
    assert child.exitcode == 0
    return True


@pytest.mark.parametrize(
    "num_kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["three", "twenty"]
)
def test_killed_and_resumed(
    pair: ModelPair, make_config: Callable[..., LabelingConfig], num_kills: int
) -> None:
    source = SourceConfig(count=2 * num_kills + 6, split="validation", levels=[1, 2])
    config = make_config(source=source, shard_size=2)
    started = time.monotonic()
    assert label_in_a_child(config, pair, None)
    whole = time.monotonic() - started
    killed = replace(config, out=config.out + "-killed")
    rng = random.Random(0)
    kills = 0
    while kills < num_kills:
        # Mostly while shards are written; some shards are finished between two kills.
        if label_in_a_child(killed, pair, rng.uniform(0.05, 2.5 * whole / num_kills)):
            # It was done too soon: take something away, so that there is more to interrupt.
            (killed.out_dir / "shards" / f"{rng.randrange(3):05d}.arrow").unlink()
        else:
            kills += 1
    assert label_in_a_child(killed, pair, None)
    assert contents(killed.out_dir) == contents(config.out_dir)
    assert not list(killed.out_dir.rglob("*.partial"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_with_their_code(tmp_path: Path, signum: int, code: int) -> None:
    out, log = tmp_path / "out", tmp_path / "stderr"
    argv = ["--config", str(ROOT / "configs" / "labeling" / "abacus.yaml")]
    argv += ["--out", str(out), "--shard_size", "4", "--engine.kv_memory", "64MiB"]

    def child() -> None:
        with log.open("w") as sys.stderr:
            code = main(argv)
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    deadline = time.monotonic() + 60
    while not (out / "manifest.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(30)
    assert process.exitcode == code
    *_, last = log.read_text().splitlines()
    assert last.startswith(f"stopped by {signal.Signals(signum).name}: the same command goes on")
    assert "Traceback" not in log.read_text()
