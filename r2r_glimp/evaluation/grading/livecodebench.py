"""Tests of LiveCodeBench's schema: what a program is given, and what it must say.

public_test_cases     JSON: [{"input": ..., "output": ..., "testtype": "stdin" | "functional"}, ...]
private_test_cases    the same; in the published set base64(zlib(pickle(JSON)))
metadata              JSON: {"func_name": ...} where a method of `Solution` is called

The pickle holds one string. It is read opcode by opcode, and nothing but a string is understood, so
a file cannot run code.
"""

import base64
import binascii
import json
import pickletools
import zlib
from dataclasses import dataclass
from typing import Any

from labeling.formats import Question
from r2r_glimp.core import DataError

COLUMNS = ("public_test_cases", "private_test_cases", "metadata")
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP")
_MAX_BYTES = 2**30  # of one question's tests, once decompressed


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One test. With a `function`, the input is its arguments, a line of JSON each."""

    input: str
    output: str
    function: str | None = None


def read_tests(question: Question) -> list[CodeTest]:
    """All tests of a question, public ones first.

    Raises:
        DataError: there are none, or they are broken.
    """
    row = question.kept
    public = _cases(row.get("public_test_cases"), question.where, "public_test_cases")
    private = _cases(row.get("private_test_cases"), question.where, "private_test_cases")
    function = _function(row.get("metadata"), question.where)
    tests = []
    for case in public + private:
        kind = case.get("testtype", "stdin")
        if kind not in ("stdin", "functional") or (kind == "functional" and function is None):
            raise DataError(
                f"{question.where}: a test of type {kind!r}: stdin, or functional with "
                "metadata.func_name"
            )
        if not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise DataError(f"{question.where}: a test lacks a text for input or output")
        tests.append(
            CodeTest(case["input"], case["output"], function if kind == "functional" else None)
        )
    if not tests:
        raise DataError(f"{question.where}: no tests, nothing can be right")
    return tests


def has_tests(question: Question) -> bool:
    """Whether there is something to decode."""
    return any(question.kept.get(key) for key in COLUMNS[:2])


def _cases(value: Any, where: str, key: str) -> list[dict[str, Any]]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = _unpacked(value, where, key)
    if not isinstance(value, list) or not all(isinstance(case, dict) for case in value):
        raise DataError(f"{where}: key {key!r} is not a list of tests")
    return value


def _unpacked(text: str, where: str, key: str) -> Any:
    try:
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b64decode(text, validate=True), _MAX_BYTES)
        if unzip.unconsumed_tail:
            raise DataError(f"{where}: key {key!r} unpacks to more than {_MAX_BYTES:,} bytes")
        return json.loads(pickled_string(data))
    except (ValueError, binascii.Error, zlib.error) as error:
        raise DataError(f"{where}: key {key!r} is neither JSON nor packed tests: {error}") from None


def pickled_string(data: bytes) -> str:
    """The string that a pickle holds.

    Raises:
        ValueError: it holds something else.
    """
    found: list[str] = []
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name in _STRINGS:
            found.append(str(value))
        elif opcode.name not in _HARMLESS:
            raise ValueError(f"a pickle that is no plain string ({opcode.name})")
    if len(found) != 1:
        raise ValueError(f"a pickle of {len(found)} strings")
    return found[0]


def _function(metadata: Any, where: str) -> str | None:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            raise DataError(f"{where}: key 'metadata' is not JSON") from None
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise DataError(f"{where}: metadata.func_name is not a name")
    return name
