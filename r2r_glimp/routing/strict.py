"""Small frozen dataclasses from JSON: every key known, none missing, every value of its type."""

import dataclasses
import math
import typing
from typing import Any

from r2r_glimp.core import CheckpointError

T = typing.TypeVar("T")


def read_fields(cls: type[T], data: Any, where: str) -> T:
    """An instance of the dataclass `cls` from a JSON object.

    Fields are bool, int, float, str, a Literal of strings, or one of these or None. A field with a
    default must be
    there all the same: what was written is what is read.

    Raises:
        CheckpointError: not an object, a key too many or too few, or a value of the wrong type;
            names `where` and key.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    check_keys(data, set(names), where)
    for name in names:
        if not _fits(data[name], hints[name]):
            raise CheckpointError(f"{where}: {name}={data[name]!r} is not {_describe(hints[name])}")
    return cls(**data)


def check_keys(data: Any, wanted: set[str], where: str) -> None:
    """Raises CheckpointError unless `data` is an object with exactly the `wanted` keys."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, found {type(data).__name__}")
    for problem, keys in (("missing", wanted - data.keys()), ("unknown", data.keys() - wanted)):
        if keys:
            raise CheckpointError(f"{where}: {problem} key {', '.join(map(repr, sorted(keys)))}")


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return value in options
    if options:  # X | None
        return any(_fits(value, option) for option in options)
    if hint is float:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, options))
    if options:
        return " or ".join(
            "null" if option is type(None) else _describe(option) for option in options
        )
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
    return names.get(hint, hint.__name__)
