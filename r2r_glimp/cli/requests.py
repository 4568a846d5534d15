"""What `generate` is asked to write: one prompt, a text file, or JSONL with one request a line.

    {"id": "q1", "prompt": "..."}                                   text: a user's message
    {"messages": [{"role": "user", "content": "..."}]}              a conversation
    {"token_ids": [1, 2, 3], "temperature": 0.6, "router": "llm"}   as it is; options of its own

Every line is checked before anything is generated, and a bad one is named by its number. Knows
nothing about models.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from r2r_glimp.cli.options import check_routing
from r2r_glimp.core import (
    DataError,
    Prompt,
    R2RGlimpError,
    RoutingParams,
    SamplingParams,
    UsageError,
)

CONTENTS = ("prompt", "messages", "token_ids")
_SAMPLING = {f.name for f in dataclasses.fields(SamplingParams)}
_ROUTING = {f.name for f in dataclasses.fields(RoutingParams)}
_BOOLS = {"ignore_eos", "repetition_guard", "trace"}
_STRINGS = {"delimiter", "router", "granularity", "answer_by"}
_LISTS = {"stop", "stop_token_ids"}
MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `line` and `id` are None outside of JSONL; `line` counts from 1."""

    prompt: Prompt
    sampling: SamplingParams
    routing: RoutingParams
    is_text: bool = True  # a text may be put into a user's message
    id: str | int | None = None
    line: int | None = None

    @property
    def name(self) -> str:
        """What messages and outputs call it."""
        if self.id is not None:
            return str(self.id)
        return "request-0" if self.line is None else f"line-{self.line}"


@dataclass(slots=True)
class Batch:
    """All requests of a call, and the lines that cannot be used, as (line, why)."""

    source: str
    requests: list[Request]
    is_jsonl: bool = False
    problems: list[tuple[int, str]] = field(default_factory=list)

    def check(self, *, skip_invalid: bool) -> None:
        """Raises DataError if a line is bad and none may be skipped, or if nothing is left."""
        if self.problems and not skip_invalid:
            line, why = min(self.problems)
            more = (
                f" (and {len(self.problems) - 1} more bad lines)" if len(self.problems) > 1 else ""
            )
            raise DataError(
                f"{self.source}, line {line}: {why}{more}; --skip_invalid runs the rest"
            )
        if not self.requests:
            bad = f": all {len(self.problems)} lines are invalid" if self.problems else ""
            raise DataError(f"{self.source} holds no request{bad}")

    def skipped(self) -> list[str]:
        """Lines for people about what was skipped."""
        problems = sorted(self.problems)
        lines = [
            f"{self.source}, line {line}: skipped: {why}" for line, why in problems[:MAX_SHOWN]
        ]
        if problems:
            total = len(problems) + len(self.requests)
            lines.append(f"{self.source}: {len(problems)} of {total} lines skipped")
        return lines


def read_batch(
    prompt: str | None,
    file: str | None,
    input_format: str,
    sampling: SamplingParams,
    routing: RoutingParams,
) -> Batch:
    """The requests of a prompt, a file (`-` is stdin), or stdin where neither is given.

    Args:
        input_format: `text`, `jsonl`, or `auto`: by a file's suffix, on stdin by its first line.

    Raises:
        UsageError: a prompt and a file, or nothing at all.
        DataError: not readable, empty, or not UTF-8. Bad lines of JSONL are in `problems` instead.
    """
    if prompt is not None and file is not None:
        raise UsageError("a prompt and --file contradict each other: give one of them")
    if prompt is not None and prompt != "-":
        if input_format == "jsonl":
            raise UsageError(
                "--input_format jsonl reads --file or stdin, not a prompt on the command line"
            )
        return Batch("the prompt", [_text_request(prompt, "the prompt", sampling, routing)])
    if file is None or file == "-":
        source, data = "stdin", _read_stdin(asked=prompt == "-" or file == "-")
        is_jsonl = input_format == "jsonl" or (input_format == "auto" and _looks_like_jsonl(data))
    else:
        source, data = file, _read_file(Path(file))
        is_jsonl = input_format == "jsonl" or (
            input_format == "auto" and Path(file).suffix.lower() in (".jsonl", ".ndjson")
        )
    if not is_jsonl:
        return Batch(source, [_text_request(_decode(data, source), source, sampling, routing)])
    return _read_jsonl(data, source, sampling, routing)


def _read_jsonl(
    data: bytes, source: str, sampling: SamplingParams, routing: RoutingParams
) -> Batch:
    batch = Batch(source, [], is_jsonl=True)
    seen: dict[str, int] = {}
    for line, raw in _lines(data):
        try:
            request = _parse_row(raw, line, sampling, routing)
            if request.name in seen:
                raise DataError(f"id {request.name!r} was used in line {seen[request.name]}")
        except R2RGlimpError as error:
            batch.problems.append((line, str(error)))
            continue
        seen[request.name] = line
        batch.requests.append(request)
    return batch


def _parse_row(raw: bytes, line: int, sampling: SamplingParams, routing: RoutingParams) -> Request:
    row = parse_json_object(raw)
    given = [key for key in CONTENTS if key in row]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise DataError(f"a request has exactly one of {', '.join(CONTENTS)}: found {found}")
    prompt, row_id = row.pop(given[0]), row.pop("id", None)
    if row_id is not None and (
        not isinstance(row_id, str | int) or isinstance(row_id, bool) or row_id == ""
    ):
        raise DataError(f"id={row_id!r:.40} is not a string or an integer")
    if isinstance(row_id, str):
        _check_unicode(row_id, "id")
    _check_prompt(given[0], prompt)
    for key, value in row.items():
        _check_override(key, value)
    own: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    sampling = dataclasses.replace(sampling, **{k: v for k, v in own.items() if k in _SAMPLING})
    routing = dataclasses.replace(routing, **{k: v for k, v in own.items() if k in _ROUTING})
    check_routing(routing)
    return Request(prompt, sampling, routing, is_text=given[0] == "prompt", id=row_id, line=line)


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
        DataError: not UTF-8, not JSON, or something else than an object.
    """
    try:
        row = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"not valid UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, found {_json_kind(row)}")
    return row


def _check_prompt(kind: str, prompt: Any) -> None:
    """The engine checks the rest: roles, ids out of range, length."""
    if kind == "prompt":
        if not isinstance(prompt, str):
            raise DataError(f"prompt is {_json_kind(prompt)}, wanted a string")
        if not prompt.strip():
            raise DataError("the prompt is empty")
        _check_unicode(prompt, "prompt")
        return
    if not isinstance(prompt, list):
        raise DataError(f"{kind} is {_json_kind(prompt)}, wanted a list")
    if not prompt:
        raise DataError(f"the prompt is empty ({kind} has no items)")
    wanted = dict if kind == "messages" else int
    for item in prompt:
        if not isinstance(item, wanted) or isinstance(item, bool):
            raise DataError(f"{kind} holds {_json_kind(item)}, wanted {_json_kind(wanted())} each")


def _check_override(key: str, value: Any) -> None:
    if key not in _SAMPLING | _ROUTING:
        raise DataError(
            f"unknown key {key!r}: id, {', '.join(CONTENTS)}, or a sampling or routing option"
        )
    wrong = (
        (key in _BOOLS and not isinstance(value, bool))
        or (key in _STRINGS and not isinstance(value, str))
        or (key in _LISTS and not isinstance(value, list | str))
    )
    if wrong:
        kind = "true or false" if key in _BOOLS else "a string" if key in _STRINGS else "a list"
        raise DataError(f"{key}={value!r:.40} is not {kind}")


def _text_request(
    text: str, source: str, sampling: SamplingParams, routing: RoutingParams
) -> Request:
    if not text.strip():
        raise DataError(
            f"{source} is empty" if source != "stdin" else "the prompt is empty (nothing on stdin)"
        )
    _check_unicode(text, source)
    return Request(text, sampling, routing)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _read_stdin(*, asked: bool) -> bytes:
    if not asked and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("nothing to write about: give a prompt, --file F, or pipe one in")
    return sys.stdin.buffer.read()


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source}, line {line}: not valid UTF-8 (byte {error.start + 1} of the file)"
        ) from None


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            yield number, raw


def _looks_like_jsonl(data: bytes) -> bool:
    """Whether the first line is a request; --input_format text is for a prompt like that."""
    for _, raw in _lines(data):
        try:
            return any(key in CONTENTS for key in parse_json_object(raw))
        except DataError:
            return False
    return False


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid Unicode text (character {error.start + 1})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _json_kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        NoneType: "null",
    }
    return names.get(type(value), "a number")
