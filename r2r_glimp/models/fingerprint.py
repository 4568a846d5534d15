"""What a model is, in a few values that can be stored with what was made for it, and compared.

Imports no torch: a stored fingerprint can be read and compared without a model.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2r_glimp.core import CheckpointError
from r2r_glimp.models.files import read_safetensors_header

if TYPE_CHECKING:
    from torch import nn

_SAMPLED_BYTES = 64 * 1024  # of the data of a weight file, at either end
_SAMPLED_VALUES = 256  # of a tensor in memory, evenly spread

# What must agree, and how to say so. Names, revisions and dtypes may differ: folders move.
_COMPARED = {
    "architecture": "architecture",
    "hidden_size": "hidden size",
    "num_layers": "number of layers",
    "vocab_size": "vocabulary size",
    "tokenizer_sha256": "tokenizer",
    "adapters": "adapters",
    "weights_sha256": "weights",
}
_OPTIONAL = {"revision", "adapters", "quantization"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a model is.

    Args:
        name_or_path: what it was loaded by; not compared.
        architecture: class name, such as `Qwen3ForCausalLM`.
        hidden_size: width of a hidden state.
        num_layers: decoder layers.
        vocab_size: rows of the input embedding, padding included.
        tokenizer_sha256: of the vocabulary, the merges and the added tokens.
        weights_sha256: of the weight files (`hash_files`), or of the values of a model that came
            from memory (`hash_values`); the two never agree. Adapters are hashed in.
        revision: commit of a Hub repository, where known; not compared.
        adapters: what was merged into it, by name.
        quantization: int8 or int4, if its weights were quantised at load; not compared.
    """

    name_or_path: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    tokenizer_sha256: str
    weights_sha256: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    quantization: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self) | {"adapters": list(self.adapters)}
        if self.quantization is None:
            del values["quantization"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Fingerprint":
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: a value is missing, unknown or of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"a fingerprint is a mapping, not a {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(map(str, set(values) - known)):
            raise CheckpointError(f"a fingerprint has no {unknown[0]!r}")
        if missing := sorted(known - _OPTIONAL - set(values)):
            raise CheckpointError(f"the fingerprint has no {missing[0]}")
        values = dict(values) | {"adapters": values.get("adapters", ())}
        for name, value in values.items():
            if not _is_valid(name, value):
                raise CheckpointError(f"the fingerprint's {name} is {value!r}")
        return cls(**values | {"adapters": tuple(values["adapters"])})

    def mismatch(self, other: "Fingerprint") -> str | None:
        """Why `other` is not the model that this is, in one line; None if it is."""
        for name, words in _COMPARED.items():
            wanted, got = getattr(self, name), getattr(other, name)
            if wanted == got:
                continue
            if name.endswith("_sha256"):
                what = f"the {words} differ" if words.endswith("s") else f"the {words} differs"
            else:
                what = f"{words} is {_show(got)}, not {_show(wanted)}"
            return f"{what} ({other.name_or_path} in place of {self.name_or_path})"
        return None


def hash_files(files: Iterable[Path]) -> str:
    """Hash over each safetensors file's size, header, and first and last 64 KiB of data, in hex.

    A change in the middle of a large file goes unseen; in return any size takes milliseconds.

    Raises:
        CheckpointError: a file is broken.
    """
    digest = hashlib.sha256()
    for path in files:
        header, size = read_safetensors_header(path), path.stat().st_size
        data_at = 8 + len(header)
        digest.update(f"{size} {len(header)}\n".encode())
        digest.update(header)
        with path.open("rb") as file:
            for start in (data_at, max(data_at, size - _SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def hash_values(model: "nn.Module") -> str:
    """Hash over the names, shapes and up to 256 values of each parameter in memory, in hex."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        flat = parameter.detach().flatten()
        values = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_valid(name: str, value: Any) -> bool:
    if name in ("hidden_size", "num_layers", "vocab_size"):
        return type(value) is int and value > 0
    if name == "adapters":
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) or (name in _OPTIONAL and value is None)


def _show(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, tuple) else str(value)
