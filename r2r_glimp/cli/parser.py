"""The one grammar of all verbs: flat options, `--config file.yaml`, `--print_config`, helps.

    --config base.yaml --config more.yaml --temperature 0.6      later wins

Options may be written with their section (`--sampling.temperature 0.6`), and a YAML file may be
sorted into sections; `--print_config` prints plain names. Knows no models; imports no torch.
"""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, NoReturn, TypeVar

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from r2r_glimp.cli.errors import PROG
from r2r_glimp.core import UsageError

SECTIONS = ("models", "engine", "sampling", "routing")
_MODE = "r2r_glimp"  # our name for "YAML, possibly sorted into sections"
_SECTION_PREFIX = re.compile(rf"--(?:{'|'.join(SECTIONS)})\.")

T = TypeVar("T")


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of examples, and tells a default without the type around it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = (None, True, False, argparse.SUPPRESS)
        if not any(action.default is value for value in silent) and "%(default)" not in text:
            text += " (default: %(default)s)"
        return text


class Parser(ArgumentParser):
    """A verb's parser.

    Args:
        verb: its name.
        usage: what follows it in the usage line.
        summary: what the verb does, for the help.
        examples: commands for the end of the help, without the program's name.
    """

    def __init__(self, verb: str, usage: str, summary: str, examples: Sequence[str]) -> None:
        lines = "\n".join(f"  {PROG} {verb} {example}".rstrip() for example in examples)
        super().__init__(
            prog=f"{PROG} {verb}",
            usage=f"{PROG} {verb} {usage}",
            description=summary,
            epilog=f"examples:\n{lines}",
            formatter_class=_Formatter,
            parser_mode=_MODE,
            allow_abbrev=False,
        )
        self._flags: list[str] = []

    def add_config(self) -> None:
        """`--config` and `--print_config`."""
        help_text = "YAML file with options; may be repeated, later ones and the command line win"
        self.add_argument("-c", "--config", action="config", metavar="FILE", help=help_text)

    def add_flag(self, group: Any, name: str, help_text: str) -> None:
        """An option that is false unless it stands there."""
        group.add_argument(f"--{name}", action="store_true", help=help_text)
        self._flags.append(name)

    def add_fields(self, group: Any, cls: type, skip: Iterable[str] = ()) -> None:
        """An option for each field of a dataclass; its docstring is their help."""
        docs = {p.arg_name: p.description or "" for p in parse_docstring(cls.__doc__ or "").params}
        # Names that only a type checker imports stay out of the way of a fast help.
        hints = typing.get_type_hints(cls, localns={"Router": str})
        for field in dataclasses.fields(cls):
            if field.name in skip:
                continue
            text = " ".join(docs.get(field.name, "").replace("%", "%%").split())
            self._add_field(group, field.name, hints[field.name], field.default, text)

    def _add_field(self, group: Any, name: str, hint: Any, default: Any, text: str) -> None:
        metavar = _metavar(hint)
        if hint is bool and default is False:
            self.add_flag(group, name, text)
        elif typing.get_origin(hint) is tuple:
            read = _as_ints if int in typing.get_args(hint) else _as_list
            text = f"{text} May be repeated."
            group.add_argument(f"--{name}", action="append", type=read, metavar=metavar, help=text)
        else:
            group.add_argument(f"--{name}", type=hint, default=default, metavar=metavar, help=text)

    def parse(self, argv: Sequence[str]) -> Namespace:
        """The options.

        Raises:
            UsageError: an option is unknown or has a value of the wrong type.
        """
        end = list(argv).index("--") if "--" in argv else len(argv)
        argv = [_SECTION_PREFIX.sub("--", arg) for arg in argv[:end]] + list(argv[end:])
        options = self.parse_args(argv)
        for name in self._flags:  # a flag's value in a YAML file is not checked by jsonargparse
            if not isinstance(options[name], bool):
                raise UsageError(f"--{name}: expected true or false, got {options[name]!r}")
        return options

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage: an error is one line."""
        raise UsageError(self._explain(message)) from ex

    def _explain(self, message: str) -> str:
        if match := re.search(r"unrecognized arguments: (\S+)", message):
            return self._explain_unknown(match[1], message)
        if match := re.match(r"Option '([^']+)' is not accepted", message):
            return self._explain_unknown(f"--{match[1]}", message)
        key = re.match(r'Parser key "([^"]+)":', message)
        given = re.search(r"(?:Given value|Got value): (.*)", message, re.DOTALL)
        if not key:
            return message
        if not given:
            return f"--{key[1]}:{message[key.end() :]}"
        expected = [
            _type_name(kind) for kind in re.findall(r"Expected an? (.*?)(?:\. Got|\n|$)", message)
        ]
        return f"--{key[1]}: expected {' or '.join(expected) or 'another value'}, got {given[1]!r}"

    def _explain_unknown(self, arg: str, message: str) -> str:
        if not arg.startswith("-"):
            return f"{message} (put quotes around a prompt or path with spaces)"
        name = arg.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(name.replace("-", "_").replace("__", "--", 1), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        return f"unknown option {name}: {hint}"


def pick(cls: type[T], options: Namespace) -> T:
    """A dataclass from the options of the same names; what they lack keeps its default."""
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in options:
            continue
        value = options[field.name]
        if isinstance(field.default, tuple):
            value = _flatten(value)
        values[field.name] = value
    return cls(**values)


def _load_yaml(stream: str, **kwargs: Any) -> Any:
    """YAML, with sections taken apart."""
    data = get_loader("yaml")(stream, **kwargs)
    if isinstance(data, dict):
        for section in SECTIONS:
            if isinstance(data.get(section), dict):
                data |= data.pop(section)
    return data


set_loader(_MODE, _load_yaml, exceptions=(yaml.YAMLError,))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_ints(value: Any) -> list[int]:
    return [int(item) for item in _flatten(_as_list(value))]


def _flatten(values: Any) -> tuple[Any, ...]:
    """A repeated option's values: its own, those of a YAML list, or both."""
    flat: list[Any] = []
    for value in values or ():
        flat += _as_list(value)
    return tuple(flat)


def _metavar(hint: Any) -> str:
    """What stands for an option's value in a help: `{token,step}`, `INT`."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, options)) + "}"
    kinds = [option for option in options if option not in (NoneType, Ellipsis)]
    if kinds:
        return _metavar(kinds[0])
    return "{true,false}" if hint is bool else getattr(hint, "__name__", "value").upper()


def _type_name(text: str) -> str:
    """jsonargparse's words for a type in ours."""
    if literal := re.match(r"typing\.Literal\[(.*)\]", text):
        return literal[1].replace("'", "").replace(",", " or")
    names = {"int": "an integer", "float": "a number", "bool": "true or false", "NoneType": "null"}
    name = re.sub(r"<class '(.*)'>", r"\1", text)
    return names.get(name, name)
