"""What the argument parser has to say, on one line."""

import re


def explain(message: str) -> str:
    """The parser's message of several lines as one."""
    line = " ".join(message.split())
    key = re.match(r'Parser key "([^"]+)":', line)
    given = re.search(r"(?:Given value|Got value): (.*)", line)
    if not key or not given:
        return line
    kinds = re.findall(r"Expected an? (<class '\w+'>|[\w.]+\[.*?\])", line)
    wanted = " or ".join(_type_name(kind) for kind in kinds) or "another value"
    return f"{key[1]}: expected {wanted}, got {given[1]!r}"


def _type_name(text: str) -> str:
    """The parser's words for a type in ours."""
    names = {"int": "an integer", "float": "a number", "bool": "true or false", "NoneType": "null"}
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", text):
        return literal[1].replace("'", "").replace(",", " or")
    name = re.sub(r"<class '(\w+)'>", r"\1", text)
    return names.get(name, name)
