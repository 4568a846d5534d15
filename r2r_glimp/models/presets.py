"""Pairs by name: `configs/pairs/NAME.yaml`, the arguments of `ModelPair.from_pretrained` as keys.

Imports no torch, so a command line can list and check presets at once.
"""

from pathlib import Path
from typing import Any

import yaml

from r2r_glimp.core import UsageError
from r2r_glimp.remote.spec import RemoteSpec, is_remote

_REQUIRED = ("slm", "llm")
_KEYS = (
    *_REQUIRED,
    *("device", "dtype", "revision", "slm_adapters", "llm_adapters"),
    *("llm_quantization", "trust_remote_code"),
)
_PACKAGE = Path(__file__).resolve().parents[1]


def preset_names() -> list[str]:
    """Names of the pairs that come with this package or lie in `configs/pairs` here, sorted."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.yaml")})


def read_preset(name_or_path: str | Path) -> dict[str, Any]:
    """The arguments of `ModelPair.from_pretrained` that a preset stands for.

    Args:
        name_or_path: a name (`abacus`), or a path (it ends in .yaml or .yml, or has a `/`).

    Returns:
        Checked keys and values. A relative path to a model or adapter that does not exist from the
        current folder, but does from the folder that holds `configs/`, is given as the latter.

    Raises:
        UsageError: no such preset, broken YAML, or a key or value that is not known.
    """
    path = _find(name_or_path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} does not hold a mapping of {', '.join(_KEYS)}")
    if unknown := [key for key in values if key not in _KEYS]:
        raise UsageError(f"{path} has the unknown key {unknown[0]!r}: it takes {', '.join(_KEYS)}")
    for key in _REQUIRED:
        if key not in values:
            raise UsageError(f"{path} has no {key}: give a folder, a Hub id or a server's url")
    for key, value in values.items():
        try:
            valid = _is_valid(key, value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        if not valid:
            raise UsageError(f"{path}: {key}={value!r} is not what this key takes")
    root = _root(path)
    for key in _REQUIRED:
        if isinstance(values[key], dict):
            if values[key].get("tokenizer"):
                values[key]["tokenizer"] = _rooted(values[key]["tokenizer"], root)
        elif not is_remote(values[key]):
            values[key] = _rooted(values[key], root)
    for key in ("slm_adapters", "llm_adapters"):
        if key in values:
            values[key] = [_rooted(name, root) for name in values[key]]
    return values


def _folders() -> list[Path]:
    # here; beside the package in a checkout; inside the package in a wheel
    roots = (Path.cwd(), _PACKAGE.parent, _PACKAGE)
    return [root / "configs" / "pairs" for root in roots]


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"{name}: no such file")
        return path
    for folder in _folders():
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise UsageError(f"no pair is named {name!r}: {', '.join(preset_names())}, or give a YAML file")


def _root(path: Path) -> Path:
    """The folder that holds `configs/`, or the file's own."""
    folder = path.resolve().parent
    return next(
        (parent.parent for parent in (folder, *folder.parents) if parent.name == "configs"), folder
    )


def _rooted(name: str, root: Path) -> str:
    relative = not Path(name).expanduser().is_absolute() and not name.startswith("~")
    if relative and not Path(name).exists() and (root / name).exists():
        return str(root / name)
    return name


def _is_valid(key: str, value: Any) -> bool:
    if key in _REQUIRED:
        if isinstance(value, dict):
            RemoteSpec.parse(value, key)
        return isinstance(value, str | dict) and bool(value)
    if key.endswith("_adapters"):
        return isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    if key == "trust_remote_code":
        return isinstance(value, bool)
    if key == "llm_quantization":
        return value is None or isinstance(value, str)
    values = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(v, str) or (v is None and key == "revision") for v in values)
