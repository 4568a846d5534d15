"""Pairs by name: every preset parses, and every mistake in one is told."""

import inspect
from pathlib import Path

import pytest

from r2r_glimp.core import UsageError
from r2r_glimp.models import ModelPair, preset_names, read_preset
from r2r_glimp.models.placement import per_model, resolve_dtype

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs" / "pairs").glob("*.yaml"))


def test_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert preset_names() == NAMES
    assert {"abacus", "qwen3-0.6b-8b", "deepseek-r1-distill-qwen-1.5b-32b"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_arguments_of_from_pretrained(name):
    preset = read_preset(name)
    inspect.signature(ModelPair.from_pretrained).bind(**preset)
    for dtype in per_model("dtype", preset["dtype"], "auto"):
        resolve_dtype(dtype)
    lines = (ROOT / "configs" / "pairs" / f"{name}.yaml").read_text().splitlines()
    assert all(line.startswith("#") or "  # " in line for line in lines), "a comment per key"


def test_paths_are_found_from_here_first(tmp_path, monkeypatch):
    (tmp_path / "configs" / "pairs").mkdir(parents=True)
    file = tmp_path / "configs" / "pairs" / "mine.yaml"
    file.write_text("slm: models/a\nllm: models/b\nslm_adapters: [models/c]\n")
    for name in "abc":
        (tmp_path / "models" / name).mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    models = tmp_path / "models"
    wanted = {
        "slm": str(models / "a"),
        "llm": str(models / "b"),
        "slm_adapters": [str(models / "c")],
    }
    assert read_preset(file) == wanted
    (elsewhere / "models" / "a").mkdir(parents=True)
    assert read_preset(str(file)) == wanted | {"slm": "models/a"}
    monkeypatch.chdir(tmp_path)
    assert read_preset("mine")["slm"] == "models/a"


def test_from_config(checkpoint, tmp_path, monkeypatch):
    checkpoint("model")
    (tmp_path / "pair.yaml").write_text("slm: model\nllm: ./model\ndevice: cpu\n")
    monkeypatch.chdir(tmp_path)
    pair = ModelPair.from_config("pair.yaml", dtype="bfloat16")
    assert pair.slm is pair.llm
    assert str(pair.slm.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slm: a\nllm: b\ncolour: red\n", "unknown key 'colour': it takes slm, llm, device"),
        ("slm: a\n", "has no llm"),
        ("slm: a\nllm: [b]\n", r"llm=\['b'\] is not what this key takes"),
        ("slm: a\nllm: b\nslm_adapters: x\n", "slm_adapters='x' is not"),
        ("slm: a\nllm: b\ntrust_remote_code: 1\n", "trust_remote_code=1 is not"),
        ("slm: a\nllm: b\ndevice: 3\n", "device=3 is not"),
        ("- slm\n", "does not hold a mapping"),
        ("", "does not hold a mapping"),
        ("slm: a\nllm: {b\n", "is not valid YAML at line"),
        ("slm: !!python/object/apply:os.system [ls]\nllm: b\n", "is not valid YAML at line 1"),
    ],
)
def test_mistakes(tmp_path, text, words):
    path = tmp_path / "pair.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        read_preset(path)
    assert "\n" not in str(error.value)


def test_unknown_names(tmp_path):
    with pytest.raises(UsageError, match="no pair is named 'abakus': abacus, "):
        read_preset("abakus")
    with pytest.raises(UsageError, match="no such file"):
        read_preset(tmp_path / "no.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError):
        read_preset(tmp_path / "bytes.yaml")
