"""Whether the files of a checkpoint are whole and safe, told from names, sizes and first bytes.

Knows nothing about torch or about what the tensors mean. Weights are safetensors or nothing:

    8 bytes: length N of the header | N bytes: JSON, {tensor: {dtype, shape, data_offsets}} | data
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r2r_glimp.core import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json")
_UNFINISHED = ("*.incomplete", "*.partial", "*.part", "*.crdownload", "*.aria2")
_UNFINISHED_HUB = (
    ".cache/huggingface/download/*.incomplete"  # where `hf download --local-dir` keeps them
)


def check_model_folder(folder: Path) -> list[Path]:
    """The weight files of a model, after a look at everything that can be wrong with a folder.

    Raises:
        CheckpointError: a file is missing, unfinished, unsafe or not what its name says.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter: give its base model here, and the adapter as "
            "slm_adapters or llm_adapters"
        )
    _check_finished(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{folder / 'config.json'} has no model_type: it is not a model's config"
        )
    for optional in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / optional).exists():
            read_json(folder / optional)
    weights = _weight_files(folder)
    for file in weights:
        read_safetensors_header(file)
    return weights


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a PEFT adapter whose files are whole.

    Raises:
        CheckpointError: a file is missing, unfinished, unsafe or not what its name says.
    """
    _check_finished(folder)
    config = read_json(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        if pickles := _matches(folder, _PICKLES):
            raise CheckpointError(_pickle_message(folder, pickles))
        raise CheckpointError(f"{folder} has no adapter_model.safetensors")
    read_safetensors_header(file)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, is something else, or is no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    if problem := _not_the_file(path):
        raise CheckpointError(f"{path} {problem}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__} where a JSON object is wanted"
        )
    return value


def read_safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file whose size is what the header says.

    Raises:
        CheckpointError: the file is cut short, has bytes to spare, or is something else.
    """
    if problem := _not_the_file(path):
        raise CheckpointError(f"{path} {problem}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file")
        header = file.read(length)
    if len(header) < length:
        raise CheckpointError(f"{path} is cut short within its header: fetch it again")
    try:
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
        raise CheckpointError(f"{path} is not a safetensors file: its header is broken") from None
    wanted = 8 + length + end
    if size != wanted:
        state = "cut short" if size < wanted else "too long"
        raise CheckpointError(
            f"{path} is {state}: {size:,} bytes, its header tells of {wanted:,}: fetch it again"
        )
    return header


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():  # the order of transformers: a single file wins over an index
        return [single]
    if index.exists():
        return _shards(index)
    if pickles := _matches(folder, _PICKLES):
        raise CheckpointError(_pickle_message(folder, pickles))
    if unfinished := _matches(folder, [_UNFINISHED_HUB]):
        raise CheckpointError(f"{folder} is half-downloaded: {_names(unfinished)} is unfinished")
    found = _matches(folder, ["*.safetensors", "*.gguf", "*.h5", "*.msgpack"])
    hint = f" (it has {_names(found)})" if found else ""
    raise CheckpointError(f"{folder} has no model.safetensors{hint}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if stray := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} names {stray[0]!r}: weights must lie beside their index")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        listed = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        raise CheckpointError(
            f"{index.parent} is half-downloaded: {len(missing)} of {len(names)} weight files are "
            f"missing ({listed})"
        )
    return [index.parent / name for name in names]


def _check_finished(folder: Path) -> None:
    if unfinished := _matches(folder, _UNFINISHED):
        raise CheckpointError(
            f"{folder} is half-downloaded: {_names(unfinished)} is unfinished: fetch it again, "
            "or delete that file"
        )


def _not_the_file(path: Path) -> str | None:
    """What a file is instead of what its name says, as the rest of a sentence."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty (0 bytes): fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the file itself: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file itself: fetch it again"
    if path.suffix == ".safetensors":
        if head.startswith(b"PK\x03\x04"):
            return "is a zip archive or pickle, not safetensors: renaming is not enough, convert it"
        if head[0] == 0x80 and head[1] in range(2, 6) and head[8:9] != b"{":
            return "is a pickle, not safetensors: renaming is not enough, convert it"
    return None


def _pickle_message(folder: Path, pickles: list[Path]) -> str:
    return (
        f"{folder} has only pickled weights ({_names(pickles)}), which can run code when read: "
        "convert them to safetensors"
    )


def _matches(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _names(paths: list[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
