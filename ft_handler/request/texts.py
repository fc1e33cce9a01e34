"""Texts of clients: decoded and checked, never quoted."""

from __future__ import annotations

import re
from typing import TypeGuard

from ft_handler.errors import MalformedRequest, RequestTooLarge, UnusableRequest

_MOST_NAME_CHARS = 1024
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")


def utf8(value: bytes | bytearray) -> str:
    """Bytes as text, without a byte-order mark; raises MalformedRequest."""
    try:
        return value.decode().removeprefix("\ufeff")  # quicker than the codec for both
    except UnicodeDecodeError:
        raise MalformedRequest("the text is not valid UTF-8") from None


def is_word(key: str) -> bool:
    """Whether a key may be named in a message: a word, and no text."""
    return _WORD.fullmatch(key) is not None


def checked_name(value: object, what: str) -> str:
    """A short string such as an id; raises RequestError saying what it is not."""
    if not isinstance(value, str):
        raise UnusableRequest(f"{what} must be a string")
    if len(value) > _MOST_NAME_CHARS:
        raise RequestTooLarge(f"{what} is longer than {_MOST_NAME_CHARS} characters")
    _check_encodable(value, what)
    return value


def is_plain(value: object, most_chars: int) -> TypeGuard[str]:
    """Whether a value is a text with nothing to check: what nearly all requests bring."""
    return (
        type(value) is str
        and len(value) <= most_chars
        and value != ""
        and not value.isspace()
        and (value.isascii() or _encodable(value))
    )


def checked_text(value: object, what: str, most_chars: int) -> str:
    """A text a model can read, of at most `most_chars`; raises RequestError in words."""
    if not isinstance(value, str):
        raise UnusableRequest(f"{what} must be a string")
    if len(value) > most_chars:
        raise RequestTooLarge(f"{what} has {len(value)} characters, the limit is {most_chars}")
    _check_encodable(value, what)
    if not value or value.isspace():
        raise UnusableRequest(f"{what} is empty")
    return value


def _check_encodable(value: str, what: str) -> None:
    if not value.isascii() and not _encodable(value):
        raise MalformedRequest(f"{what} holds a lone surrogate")


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
