"""Python literals, with a bounded depth."""

from __future__ import annotations

import re

# -- Python literals -----------------------------------------------------------------------------

_LITERAL = re.compile(
    r"""\s*(?:
      (?P<string>'[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*")
    | (?P<number>-?[0-9]{1,15}(?:\.[0-9]{1,20})?)
    | (?P<name>True|False|None)
    | (?P<mark>[][{}:,])
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_LITERAL_DEPTH = 6


def _unescape(match: re.Match[str]) -> str:
    body = match[1]
    if len(body) > 1:
        code = int(body[1:], 16)
        if code > 0x10FFFF:
            raise ValueError("escape out of range")
        return chr(code)
    if body in "\\'\"":
        return body
    return _ESCAPES.get(body, "\\" + body)


def parse_literal(text: str) -> object:
    """The dicts, lists, strings and scalars of a Python literal; raises ValueError for the rest.

    Clients of the published question-answering sample send `str(dict)`. `ast.literal_eval` can
    exhaust the C stack on hostile text; this reader has a bounded depth.
    """
    value, position = _literal(text, 0, _LITERAL_DEPTH)
    if text[position:].strip():
        raise ValueError("text after the literal")
    return value


def single_quoted(literal: str) -> bool:
    """Whether a literal has a string in single quotes, which JSON never has."""
    return any((match["string"] or "").startswith("'") for match in _LITERAL.finditer(literal))


def _token(text: str, position: int) -> tuple[str, str, int]:
    match = _LITERAL.match(text, position)
    if match is None or match.lastgroup is None:
        raise ValueError("not a literal")
    return match.lastgroup, match[match.lastgroup], match.end()


def _literal(text: str, position: int, depth: int) -> tuple[object, int]:
    if depth == 0:
        raise ValueError("nested too deep")
    kind, token, position = _token(text, position)
    if kind == "string":
        body = token[1:-1]
        return (_ESCAPE.sub(_unescape, body) if "\\" in body else body), position
    if kind == "number":
        return (float(token) if "." in token else int(token)), position
    if kind == "name":
        return {"True": True, "False": False, "None": None}[token], position
    if token == "[":
        return _literal_items(text, position, depth, "]", [])
    if token == "{":
        return _literal_items(text, position, depth, "}", {})
    raise ValueError("not a literal")


def _literal_items(
    text: str, position: int, depth: int, close: str, into: list[object] | dict[str, object]
) -> tuple[object, int]:
    while True:
        _, token, after = _token(text, position)
        if token == close:
            return into, after
        value, position = _literal(text, position, depth - 1)
        if isinstance(into, dict):
            if not isinstance(value, str) or _token(text, position)[1] != ":":
                raise ValueError("not a dict")
            _, _, position = _token(text, position)
            into[value], position = _literal(text, position, depth - 1)
        else:
            into.append(value)
        _, token, position = _token(text, position)
        if token == close:
            return into, position
        if token != ",":
            raise ValueError("not a literal")
