"""Labeling on real Ray: the same bytes, a worker killed in the middle, and what goes wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from labeling.__main__ import main
from labeling.cluster import Cluster, RayExecutor
from labeling.config import LabelingConfig
from labeling.progress import Meter
from labeling.run import run
from labeling.sections import BranchConfig, JudgeConfig, RayConfig, SourceConfig, VerifierConfig
from labeling.shards import ShardStore, plan
from labeling.sources import load_questions
from r2r_glimp.core import EngineError, UsageError
from r2r_glimp.models import ModelPair
from tests.labeling.test_judge import Endpoint, Reply, says, serve  # noqa: F401
from tests.labeling.test_shards import contents

NUM_QUESTIONS = 6
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Ray on this machine, with room for two workers even on one core: the work here is waiting."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{before}"
    with Cluster(RayConfig(workers=2, cpus=0.5)) as entered:
        yield entered
    os.environ["PYTHONPATH"] = before


class SlowJudge:
    """A judge that takes its time."""

    def __init__(self, serve: Callable[..., Endpoint]) -> None:  # noqa: F811
        self.latency_s = 0.2
        self.endpoint = serve(self.reply)
        self.config = JudgeConfig(
            url=self.endpoint.url, model="m", concurrency=1, both_orders=False, retries=0
        )

    def reply(self, body: dict[str, Any], number: int) -> Reply:
        time.sleep(self.latency_s)
        return says("SAME" if len(body["messages"][0]["content"]) % 2 else "DIFFERENT")


@pytest.fixture
def judge(serve: Callable[..., Endpoint]) -> SlowJudge:  # noqa: F811
    return SlowJudge(serve)


@pytest.fixture
def config(make_config: Callable[..., LabelingConfig]) -> LabelingConfig:
    """A question in each shard."""
    return make_config(
        source=SourceConfig(count=NUM_QUESTIONS, split="validation", levels=[2]),
        branches=BranchConfig(until="sentence", max_tokens=32),
        verifier=VerifierConfig(kind="identical"),
        shard_size=1,
        device="cpu",
        dtype="float32",
        ray=RayConfig(cpus=0.5),
    )


def label(config: LabelingConfig, executor: RayExecutor) -> tuple[float, dict[str, bytes]]:
    """Label once more: seconds, and the shards' bytes."""
    store = ShardStore(config.out_dir)
    shutil.rmtree(config.out_dir / "shards", ignore_errors=True)
    (config.out_dir / "shards").mkdir(parents=True)
    shards = plan(load_questions(config.source), config.shard_size)
    started = time.monotonic()
    entries = list(executor.map(shards, "0", Meter(NUM_QUESTIONS, stream=StringIO())))
    elapsed = time.monotonic() - started
    assert sorted(entry.shard for entry in entries) == list(range(NUM_QUESTIONS))
    files = sorted((store.out / "shards").iterdir())
    return elapsed, {path.name: path.read_bytes() for path in files}


def test_two_workers_are_faster_and_a_third_dies(
    config: LabelingConfig, judge: SlowJudge, cluster: Cluster, pair: ModelPair
) -> None:
    config = replace(config, verifier=VerifierConfig(kind="judge", judge=judge.config))
    executor = RayExecutor(config, cluster)
    executor.num_workers = 1
    one, shards = label(config, executor)
    assert judge.endpoint.most == 1
    executor.num_workers = 2
    executor.start_workers(2)
    two, again = label(config, executor)
    assert judge.endpoint.most == 2 and again == shards
    print(f"\none worker {one:.2f} s, two {two:.2f} s: {one / two:.2f} times", file=sys.stderr)
    assert one / two > 1.3  # 1.7 and more where the cores are free

    num_before = len(judge.endpoint.requests)

    def kill() -> None:
        while len(judge.endpoint.requests) < num_before + 3:  # in the middle of a shard
            time.sleep(0.01)
        os.kill(workers_at_work()[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    _, again = label(config, executor)
    thread.join()
    assert again == shards  # no half written file either
    # Two runs before this one, of the same number of questions to the judge; one began again.
    assert len(judge.endpoint.requests) > num_before + num_before // 2

    judge.latency_s = 0.0
    local = replace(config, out=f"{config.out}-local")
    run(local, pair)
    assert {k: v for k, v in contents(local.out_dir).items() if k.startswith("shards")} == {
        f"shards/{name}": data for name, data in shards.items()
    }
    executor.close()


def test_a_run_on_ray_is_the_run_on_this_machine(
    config: LabelingConfig, cluster: Cluster, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "__enter__", lambda self: cluster)
    monkeypatch.setattr(Cluster, "__exit__", lambda self, *_: None)
    cluster.num_workers = 1
    ray = replace(config, executor="ray", out=f"{config.out}-ray")
    summary = run(ray)
    assert summary is not None
    assert summary["counts"] == (run(config, pair) or {})["counts"]
    assert contents(ray.out_dir) == contents(config.out_dir)
    # What is finished stays finished, whoever did it.
    (ray.out_dir / "shards" / "00001.arrow").unlink()
    assert run(replace(ray, executor="local"), pair) is not None
    assert contents(ray.out_dir) == contents(config.out_dir)


def workers_at_work() -> list[int]:
    """Processes below this one that label a shard now."""
    found = []
    for pid in processes():
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::_Worker.label") and os.getpid() in ancestors(pid):
            found.append(pid)
    return found


def processes() -> list[int]:
    """All that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(int(folder.name))
    return found


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found


def test_a_failure_of_a_worker_is_one_line(
    config: LabelingConfig, judge: SlowJudge, cluster: Cluster
) -> None:
    with pytest.raises(UsageError, match="no pair is named 'nowhere'"):
        RayExecutor(replace(config, pair="nowhere"), cluster)
    down = replace(judge.config, url="http://127.0.0.1:9")
    config = replace(config, verifier=VerifierConfig(kind="judge", judge=down))
    executor = RayExecutor(config, cluster)
    with pytest.raises(EngineError, match="the judge at .* cannot be used: .*refused"):
        label(config, executor)
    executor.close()


def test_what_the_cluster_does_not_have(cluster: Cluster) -> None:
    cluster.config = RayConfig(gpus=64)
    with pytest.raises(UsageError, match=r"has room for one worker \(CPU: 1, GPU: 64\)"):
        cluster._room()
    cluster.config = RayConfig(resources={"h100": 1})
    with pytest.raises(UsageError, match="h100: 1"):
        cluster._room()
    cluster.config = RayConfig(cpus=0.5)
    assert cluster._room() >= 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ray.workers", "0"], "ray.workers=0 is out of range: 1 or more"),
        (["--ray.cpus", "0"], "a worker must need something"),
        (["--ray.resources", '{"a": -1}'], "ray.a=-1.* is out of range: 0 or more"),
        (["--num_shards", "2"], "executor=ray shares it itself"),
    ],
)
def test_settings_that_make_no_sense(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--executor", "ray", *argv]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_ray_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["--executor", "ray", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: executor=ray needs Ray, which is not installed: pip install 'r2r_glimp[ray]'\n"
    )


def test_the_executor_is_no_part_of_what_a_run_is(config: LabelingConfig) -> None:
    assert replace(config, executor="ray", ray=RayConfig(gpus=1)).identity() == config.identity()
    assert "ray" not in json.dumps(config.identity())


@pytest.mark.slow
def test_sigterm_ends_the_run_and_ray(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "labeling", "--config", "configs/labeling/abacus.yaml"]
    command += ["--out", str(out), "--limit", "200", "--shard_size", "4", "--executor", "ray"]
    command += ["--ray.cpus", "0.5", "--ray.workers", "1", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "manifest.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started = [pid for pid in processes() if run.pid in ancestors(pid)]
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 143
    assert said.splitlines()[-1].startswith("stopped by SIGTERM: the same command goes on"), said
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while set(started) & set(processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(started) > 2 and not set(started) & set(processes())
