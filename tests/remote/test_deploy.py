"""The presets of configs/deploy are what the verbs take, and say what each key does."""

import re
from pathlib import Path

import pytest
import yaml

from labeling.__main__ import parse
from r2r_glimp.cli.options import PairOptions, pair_arguments
from r2r_glimp.cli.parser import pick
from r2r_glimp.cli.serve import build_parser
from r2r_glimp.models import read_preset
from r2r_glimp.remote.spec import RemoteSpec

FOLDER = Path(__file__).parents[2] / "configs" / "deploy"
PRESETS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_key_has_a_comment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    for line in text.splitlines():
        if re.match(r"\s*\w+: +[^\s]", line):
            assert " # " in line, f"{path.name}: {line.strip()} has no comment"


@pytest.mark.parametrize("name", ["one-gpu", "two-gpus"])
def test_servers(name: str) -> None:
    options = build_parser().parse(["--config", str(FOLDER / f"{name}.yaml")])
    arguments = pair_arguments(pick(PairOptions, options))
    devices = {"one-gpu": "cuda", "two-gpus": ["cuda:1", "cuda:0"]}
    assert arguments["device"] == devices[name]
    assert options.granularity == "step" and options.max_batch >= 8


@pytest.mark.parametrize("name", ["vllm", "sglang", "both-remote"])
def test_pairs(name: str) -> None:
    preset = read_preset(FOLDER / f"{name}.yaml")
    spec = RemoteSpec.parse(preset["llm"], "llm")
    assert spec.url.startswith("http://localhost:") and spec.api in ("completions", "sglang")
    assert isinstance(preset["slm"], dict) == (name == "both-remote")


def test_labeling() -> None:
    config = parse(["--config", str(FOLDER / "labeling-ray.yaml")])
    assert config.executor == "ray" and config.ray.needs == {"CPU": 4, "GPU": 1}
    assert read_preset(config.pair)


def test_all_are_looked_at() -> None:
    names = {"one-gpu", "two-gpus", "vllm", "sglang", "both-remote", "labeling-ray"}
    assert {path.stem for path in PRESETS} == names
