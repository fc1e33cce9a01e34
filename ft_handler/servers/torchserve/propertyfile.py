"""Java's properties format, read and written as `java.util.Properties` does.

A line is `key=value`, `key:value` or `key value`; a backslash at its end continues it on the next
one, whose leading blanks go; `\\t`, `\\n`, `\\r`, `\\f` and `\\uXXXX` are escapes, and a backslash
before anything else goes. Lines that begin with `#` or `!` are comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_BLANK = " \t\f"
_LETTERS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_NAMES = {value: "\\" + letter for letter, value in _LETTERS.items()}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(u)|(.)|$)", re.DOTALL)
# The first blank, = or : with no odd backslash before it ends the key.
_KEY = re.compile(r"((?:\\.|[^\\=: \t\f])*)[ \t\f]*[=:]?[ \t\f]*(.*)", re.DOTALL)


def parse(text: str) -> dict[str, str]:
    """Keys and values, the last of equal keys; raises ValueError for a cut `\\u` escape."""
    found = {}
    for line in _logical_lines(text):
        match = _KEY.fullmatch(line)
        assert match is not None  # the pattern takes any text
        found[_unescaped(match[1])] = _unescaped(match[2])
    return found


def dump(properties: Mapping[str, str]) -> str:
    """A line a property, in ASCII, that Java and `parse` read back."""
    return "".join(f"{_escaped(k, key=True)}={_escaped(v)}\n" for k, v in properties.items())


def _logical_lines(text: str) -> Iterator[str]:
    """Lines that are no comment and not blank, continuations joined, leading blanks off."""
    whole: str | None = None
    text = re.sub(r"((?<!\r)\n|\r)\Z", "", text)  # continued by nothing, a line is still one
    for natural in re.split(r"\r\n|\n|\r", text):
        line = natural.lstrip(_BLANK)
        if not whole and (not line or line[0] in "#!"):
            whole = None
            continue
        whole = (whole or "") + line
        if (len(line) - len(line.rstrip("\\"))) % 2:
            whole = whole[:-1]
            continue
        yield whole
        whole = None
    if whole is not None:
        yield whole


def _unescaped(text: str) -> str:
    def char(match: re.Match[str]) -> str:
        digits, broken, other = match.groups()
        if broken:
            raise ValueError(r"\u must be followed by four hexadecimal digits")
        if digits:
            return chr(int(digits, 16))
        return _LETTERS.get(other, other or "")

    found = _ESCAPE.sub(char, text)
    # Java's characters are UTF-16 units: two escapes may be one character.
    return found.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _escaped(text: str, key: bool = False) -> str:
    units = text.encode("utf-16-be", "surrogatepass")
    parts = []
    for at in range(0, len(units), 2):
        char = chr(int.from_bytes(units[at : at + 2], "big"))
        if char in _NAMES:
            parts.append(_NAMES[char])
        elif char in "\\#!=:" or (char == " " and (key or at == 0)):
            parts.append("\\" + char)
        elif " " <= char <= "~":
            parts.append(char)
        else:
            parts.append(f"\\u{ord(char):04x}")
    return "".join(parts)
