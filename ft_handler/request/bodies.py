"""What a body is: a text, or the document that JSON or a Python literal spells.

What the client declared decides first, then how the body begins. Declared JSON is JSON and nothing
else. Declared text that is no valid document is a text, whatever it begins with. Without a
declaration a body that begins like a document has to be one. Broken JSON is never repaired.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from functools import lru_cache
from typing import NamedTuple

import orjson

from ft_handler.errors import MalformedRequest, UnsupportedMedia
from ft_handler.request.literals import parse_literal, single_quoted
from ft_handler.request.texts import utf8
from ft_handler.types import Incoming

#: Brackets, then a quote or nothing: what no sentence begins with.
_DOCUMENT_START = re.compile(r"\s*[\[{][\s\[{]*(?:[\"']|$)")

#: Charsets that may be declared -> Python's name. Codecs that are no charset are left out, and the
#: codec registry, which remembers every name it is asked for, never sees a client's.
_CHARSETS = {
    **dict.fromkeys(("utf-8", "utf8", "us-ascii", "ascii"), "utf-8"),
    **{name: name for name in ("utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be")},
    **{f"iso-8859-{part}": f"iso8859-{part}" for part in (*range(1, 12), *range(13, 17))},
    **{f"windows-{page}": f"cp{page}" for page in (874, *range(1250, 1259))},
    "latin1": "iso8859-1",
    **{name: name for name in ("shift_jis", "euc-jp", "iso-2022-jp", "euc-kr", "big5")},
    **{name: name for name in ("gb2312", "gbk", "gb18030", "koi8-r", "koi8-u", "macintosh")},
}


class Kind(Enum):
    """What a client said its body is."""

    JSON = auto()
    TEXT = auto()
    UNSAID = auto()


class Declared(NamedTuple):
    """A content type as far as it matters here: the kind, and the charset in lower case."""

    kind: Kind
    charset: str | None


@lru_cache(maxsize=64)
def declared(content_type: str | None) -> Declared:
    """What a content type says of a body."""
    if not content_type:
        return Declared(Kind.UNSAID, None)
    mime, *parameters = (part.strip().lower() for part in content_type.split(";"))
    charset = None
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.rstrip() == "charset":
            charset = value.strip().strip("\"'") or None
    if mime == "application/json" or mime.endswith("+json"):
        return Declared(Kind.JSON, charset)
    if mime.startswith("text/"):
        return Declared(Kind.TEXT, charset)
    # The charset of a form is that of its fields, which say their own.
    form = mime.startswith("multipart/") or mime == "application/x-www-form-urlencoded"
    return Declared(Kind.UNSAID, None if form else charset)


def read_body(incoming: Incoming) -> object:
    """A text as str, or a document; raises RequestError for a body that is neither.

    A string is read as a text is. What a server's parser made of a body comes back as it is.
    """
    body = incoming.body
    if not isinstance(body, (str, bytes, bytearray)):
        return body
    kind, charset = declared(incoming.content_type)
    if isinstance(body, str):
        if kind is Kind.TEXT and charset is not None and _codec(charset) != "utf-8":
            body = _decoded(body.encode(), charset)  # the server took it for UTF-8
        # What a parser found in declared JSON is a string now, and no longer JSON.
        return read_text(body, Kind.TEXT if kind is Kind.JSON else kind)
    if incoming.content_encoding:
        _check_encoding(incoming.content_encoding)
    text = utf8(body) if charset is None else _decoded(body, charset)
    if kind is not Kind.JSON:
        return read_text(text, kind)
    if not text or text.isspace():
        raise MalformedRequest("the body is empty")
    return parse_json(text)


def read_text(text: str, kind: Kind = Kind.UNSAID) -> object:
    """The document that a text spells, else the text itself; raises MalformedRequest."""
    text = text.removeprefix("\ufeff")
    start = text.lstrip()[:1]
    if not start:
        raise MalformedRequest("the body is empty")
    if start not in ("{", "["):
        return text
    try:
        return parse_json(text)
    except MalformedRequest:
        pass
    if "'" in text:
        try:
            document = parse_literal(text)
        except ValueError:
            pass
        else:
            if single_quoted(text):
                return document
    if kind is Kind.UNSAID and _DOCUMENT_START.match(text):
        raise MalformedRequest("the body is not valid JSON")
    return text


def parse_json(text: str) -> object:
    """The document of a body that has to be JSON; raises MalformedRequest.

    What Python's own parser takes beside, such as NaN and lone surrogates, is a document as well,
    since servers parse with it: so it is refused for its value, whoever parsed it.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise MalformedRequest("the body is not valid JSON") from None


def _codec(charset: str) -> str:
    try:
        return _CHARSETS[charset]
    except KeyError:
        raise UnsupportedMedia(
            "the charset of the Content-Type is not one that is known here; send UTF-8"
        ) from None


def _decoded(body: bytes | bytearray, charset: str) -> str:
    codec = _codec(charset)
    if codec == "utf-8":
        return utf8(body)
    try:
        return body.decode(codec).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise MalformedRequest(f"the text is not valid in its charset, {charset}") from None


_ENCODINGS = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")


def _check_encoding(encoding: str) -> None:
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return
    which = f"Content-Encoding {name}" if name in _ENCODINGS else "this Content-Encoding"
    raise UnsupportedMedia(f"{which} is not supported; send the body uncompressed")
