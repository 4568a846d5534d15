"""Saving and loading: what was written is read back, anything else is refused in one line."""

import errno
import json
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelHubMixin
from safetensors.torch import load_file, save_file

import r2r_glimp
from r2r_glimp.core import CheckpointError, UsageError
from r2r_glimp.hub.checkpoint import FILES, RouterCheckpoint, load_router


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_router(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_round_trip(make_checkpoint, folder):
    saved, loaded = make_checkpoint(), RouterCheckpoint.from_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert loaded.config == saved.config
    assert loaded.curve == saved.curve and loaded.traffic == saved.traffic is not None
    assert loaded.training_config == saved.training_config
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], saved.tensors[name]) for name in saved.tensors)
    assert isinstance(loaded, ModelHubMixin)


def test_saved_twice_is_the_same_bytes(make_checkpoint, folder, tmp_path):
    RouterCheckpoint.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_load_router(folder, make_checkpoint):
    router = r2r_glimp.load_router(folder)
    assert router.name == "mlp" and router.granularity == "token"
    assert router.threshold("token") == 0.25
    assert router.slm == make_checkpoint().config.slm
    assert not any(p.is_meta or p.requires_grad for p in router.net.parameters())


def test_optional_files_may_be_missing(folder):
    for name in ("curve.json", "traffic.json", "training_config.yaml", "README.md"):
        (folder / name).unlink()
    loaded = RouterCheckpoint.from_pretrained(folder)
    assert loaded.curve is None and loaded.training_config is None


def test_a_folder_that_is_not_there(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "no such folder" in refusal(Path("./nothing"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "empty"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        ("model.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("model.safetensors", b"PK\x03\x04" + bytes(60), "zip archive"),
        ("model.safetensors", b"\x80\x04\x95" + bytes(60), "pickle"),
        ("model.safetensors", bytes(range(200)), "not a safetensors file"),
        ("config.json", b"", "empty"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        ("config.json", b"<html>", "web page"),
        ("config.json", b'{"format_version": 1,}', "not valid JSON"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("config.json", b'{"\xff": 1}', "not valid JSON"),
        ("config.json", b"[]", "holds a list"),
        ("config.json", b"{}", "no format_version: this is not a router checkpoint"),
        ("curve.json", b'{"threshold": []}', "curve.json: missing key 'llm_share'"),
        ("traffic.json", b"{}", "traffic.json: missing key 'answer_by', 'cuts'"),
        ("training_config.yaml", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_is_something_else(folder, name, content, message):
    (folder / name).write_bytes(content)
    assert message in refusal(folder)
    assert name in refusal(folder)


def test_truncated_and_too_long(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (4, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "cut short" in refusal(folder) or "not a safetensors" in refusal(folder)
    path.write_bytes(whole + b"x")
    assert "too long" in refusal(folder)
    path.write_bytes(struct.pack("<Q", 2**40) + whole[8:])
    assert "not a safetensors" in refusal(folder)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), "lacks tensor head.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "has an unknown tensor extra"),
        (lambda t: t.update({"head.bias": torch.ones(2)}), r"head.bias has shape [2], config.json"),
        (lambda t: t.update({"head.bias": t["head.bias"].half()}), "dtype F16, wanted F32"),
        (lambda t: t["head.bias"].fill_(float("nan")), "head.bias has NaN or infinite weights"),
        (lambda t: t["std"].fill_(0), "std has values that are not positive"),
    ],
)
def test_tensors_must_be_those_of_the_config(folder, change, message):
    change_tensors(folder, change)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2 is not 1: update r2r_glimp"),
        ({"router": "os.system"}, "unknown router 'os.system', known: mlp"),
        ({"router": ["mlp"]}, "unknown router"),
        ({"granularity": "word"}, "granularity='word' is not token or step"),
        ({"auto_map": {}}, "unknown key 'auto_map'"),
        ({"network": {}}, "network: missing key"),
        ({"features": None}, "features: expected an object"),
        ({"thresholds": {}}, "default threshold 'recall-0.95' is not in []"),
        ({"thresholds": []}, "thresholds is not an object"),
        ({"thresholds": {"recall-0.95": {"value": 0.5}}}, "missing key"),
        ({"default_threshold": 3}, "default_threshold=3 has the wrong type"),
        ({"metrics": {"ap": "high"}}, "metrics: ap='high' has the wrong type"),
        ({"slm": {"name_or_path": "x"}}, "slm: "),
        ({"slm": 3}, "slm: "),
    ],
)
def test_config_is_read_strictly(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refusal(folder)


def test_numbers_json_cannot_say(folder):
    path = folder / "config.json"
    for number in ("NaN", "1e999"):
        text = path.read_text().replace('"value": 0.25', f'"value": {number}')
        (folder / "other.json").write_text(text)
        path.write_text(text)
        assert "is not a finite number" in refusal(folder)
        path.write_text(text.replace(number, "0.25"))


def test_pickles_are_named_and_not_loaded(folder):
    (folder / "model.safetensors").rename(folder / "router.pt")
    assert "pickles are not loaded; `r2r-glimp import-r2r`" in refusal(folder)
    (folder / "config.json").unlink()
    assert "router.pt" in refusal(folder)


def test_existing_folders(folder, make_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="is there already: .*--overwrite"):
        make_checkpoint(1).save_pretrained(folder)
    make_checkpoint(1).save_pretrained(folder, overwrite=True)
    new = RouterCheckpoint.from_pretrained(folder).tensors
    assert torch.equal(new["head.weight"], make_checkpoint(1).tensors["head.weight"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds something else"):
        make_checkpoint().save_pretrained(tmp_path / "mine", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "router"]


def test_a_full_disk_leaves_the_old_one(folder, make_checkpoint, tmp_path, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in FILES}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        make_checkpoint(1).save_pretrained(folder, overwrite=True)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert [path.name for path in tmp_path.iterdir()] == ["router"]
