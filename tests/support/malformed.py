"""Requests that must be refused, as a client sends them, each with the status it has to get.

`CASES[mode]` are HTTP bodies with their content type; `as_request` turns one into what the
TorchServe adapter makes of it, so that the same corpus drives the pipeline alone and a real server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ft_handler.errors import RequestError
from ft_handler.servers.torchserve.adapter import incoming
from ft_handler.types import Incoming

MODES = ("sequence_classification", "question_answering", "token_classification")

#: Limits the corpus relies on; both are the defaults.
MAX_INPUTS = 2048
MAX_CHARS = 250_000


@dataclass(frozen=True)
class Case:
    """One bad request: content_type None sends none (TorchServe hands over raw bytes)."""

    name: str
    content_type: str | None
    body: bytes
    status: int


def as_item(content_type: str | None, body: bytes) -> dict[str, Any]:
    """What TorchServe 0.12 makes of a body."""
    value: Any = bytearray(body)
    content_type = content_type.partition(";")[0].strip() if content_type else None
    if content_type == "application/json":
        try:
            value = json.loads(body.decode("utf-8"))
        except Exception:
            value = bytearray(body)
    elif content_type is not None and content_type.startswith("text"):
        try:
            value = body.decode("utf-8")
        except UnicodeDecodeError:
            value = bytearray(body)
    return {"body": value}


def as_request(
    content_type: str | None, body: bytes, headers: Mapping[str, str] | None = None
) -> Incoming | RequestError:
    """What the adapter makes of a body and its headers."""
    own = {} if content_type is None else {"Content-Type": content_type}
    return incoming(as_item(content_type, body), {**own, **(headers or {})})


JSON = "application/json"
PLAIN = "text/plain"

_VALID = {
    "sequence_classification": {"text": "a warm film"},
    "question_answering": {"question": "who built it", "context": "an engineer built the bridge"},
    "token_classification": {"text": "a warm film"},
}
#: What another task is asked.
_OTHER = {
    "sequence_classification": _VALID["question_answering"],
    "question_answering": _VALID["sequence_classification"],
    "token_classification": _VALID["question_answering"],
}
_FIELDS = {
    "sequence_classification": ("text", "text_pair"),
    "question_answering": ("question", "context"),
    "token_classification": ("text",),
}
_NOT_INTEGERS: tuple[object, ...] = (0, -1, 1.5, "2", True, [], {}, 2**40)
_NOT_LENGTHS: tuple[object, ...] = (-1, 1.5, "2", True, [], {}, 2**40)
_NOT_BOOLEANS: tuple[object, ...] = (0, 1, "true", [], {}, 0.5)
_BAD_PARAMETERS: dict[str, dict[str, tuple[object, ...]]] = {
    "sequence_classification": {
        "top_k": _NOT_INTEGERS,
        "function_to_apply": (1, True, "relu", "", [], {}),
        "truncation": _NOT_BOOLEANS,
        "long_texts": (1, True, "window", "", [], {}),
        "stride": _NOT_LENGTHS,
    },
    "question_answering": {
        "top_k": (*_NOT_INTEGERS, 101),
        "doc_stride": _NOT_LENGTHS,
        "max_answer_len": _NOT_INTEGERS,
        "max_seq_len": (*_NOT_INTEGERS, 3, 100_000),
        "max_question_len": _NOT_INTEGERS,
        "handle_impossible_answer": _NOT_BOOLEANS,
        "align_to_words": _NOT_BOOLEANS,
    },
    "token_classification": {
        "aggregation_strategy": (1, True, "last", "", [], {}),
        "ignore_labels": (1, True, {}, [1], ["O", None], [["O"]]),
        "stride": _NOT_LENGTHS,
        "ignore_subwords": _NOT_BOOLEANS,
        "grouped_entities": _NOT_BOOLEANS,
    },
}


def _cases(mode: str) -> list[Case]:
    valid = _VALID[mode]
    text = json.dumps(valid).encode()
    out: list[Case] = []

    def add(name: str, body: bytes, status: int, *types: str | None) -> None:
        for content_type in types or (None, PLAIN, JSON):
            out.append(Case(f"{name} [{content_type}]", content_type, body, status))

    def document(name: str, value: object, status: int) -> None:
        add(name, json.dumps(value).encode(), status, JSON)

    def nearly(name: str, body: bytes) -> None:
        """What begins like a document and is none: as declared text it is a text."""
        add(name, body, 400, *((None, JSON) if "text" in valid else ()))

    # Bytes that are no text.
    add("empty", b"", 400)
    add("white space", b" \t\r\n ", 400)
    for name, body in {
        "stray continuation byte": b"a \x80 b",
        "overlong slash": b"\xc0\xaf",
        "cut sequence": "caf\u00e9".encode()[:-1],
        "latin-1": "caf\u00e9 au lait".encode("latin-1"),
        "utf-16 with mark": "a warm film".encode("utf-16"),
        "utf-8 surrogate": b"\xed\xa0\x80",
        "gzip header": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
        "png header": b"\x89PNG\r\n\x1a\n",
        "beyond unicode": b"\xf5\x80\x80\x80",
    }.items():
        add(name, body, 400)

    # Text that is nearly JSON.
    for cut in range(1, len(text), 5):
        nearly(f"object cut at {cut}", text[:cut])
    for name, body in {
        "brackets crossed": b'{"text": ["a"}]',
        "second document": text + text,
        "trailing comma and text": text[:-1] + b",} x",
        "missing colon": b'{"text" "a"}',
        "bad escape": b'{"text": "\\q"}',
        "trailing comma": text[:-1] + b",}",
        "trailing comma in a list": b"[" + text + b",]",
        "raw newline in a string": b'{"text": "a\nb"',
        "hexadecimal": b'{"text": 0x10}',
        "plus sign": b'{"text": +1}',
        "unbalanced list": b'["a", "b"',
        "list of nothing": b'["a",, "b"]',
        "nested too deep": b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "never closed": b'[{"text":' * 3000,
        "literal with a call": b"{'text': open('x')}",
        "literal with an operator": b"{'text': 'a' * 9}",
        "literal set": b"{'a', 'b'}",
    }.items():
        nearly(name, body)
    for name, body in {
        "bare word": b"{text: a}",
        "comment": b"/* a */" + text,
        "plain text": b"a warm film",
        "link": b"[[Film]] is great",
        "set": b"{wow} nice",
        "single quotes": str(valid).encode(),
    }.items():
        add(name, body, 400, JSON)
    add("lone surrogate escape", json.dumps({**valid, _FIELDS[mode][0]: "\ud800"}).encode(), 400)
    named = next(iter(_BAD_PARAMETERS[mode]))
    add("not a number", json.dumps({**valid, named: float("nan")}).encode(), 422)
    if mode == "question_answering":
        for body in (b"who built it?", b"123", b'"text"', b"(1, 2)"):
            add(f"plain text {body!r}", body, 400, None, PLAIN)

    # JSON of the wrong shape.
    for value in (1, 1.5, True, None):
        document(f"top level {value!r}", value, 422)
    document("top level empty string", "", 400)
    document("empty object", {}, 400)
    document("empty list", [], 422)
    for value in (1, None, True, [], [["a"]], 0.5):
        document(f"list of {value!r}", [value], 422)
    document("list of empty objects", [{}], 400)
    document("good and bad in one list", [valid, {"unknown": 1}], 400)
    document("too many inputs", [valid] * (MAX_INPUTS + 1), 413)
    for field in _FIELDS[mode]:
        for value in (1, 1.5, True, ["a"], {"a": 1}):
            if field == "question" and isinstance(value, list):
                continue  # several questions
            document(f"{field} is {value!r}", {**valid, field: value}, 422)
        document(f"{field} is empty", {**valid, field: ""}, 422)
        document(f"{field} is blank", {**valid, field: " \u2003\n"}, 422)
        document(f"{field} is too long", {**valid, field: "a " * (MAX_CHARS // 2 + 1)}, 413)
    for field in valid:
        document(
            f"no {field}", {k: v for k, v in valid.items() if k != field} or {"target": 1}, 400
        )
        document(f"{field} is null", {**valid, field: None}, 422)
    document("unknown key", {**valid, "texts": "a"}, 400)
    document("wrong case", {k.upper(): v for k, v in valid.items()}, 400)
    document("other task", _OTHER[mode], 400)
    if mode == "token_classification":
        document("a pair", [["a warm film", "a good story"]], 422)
        document("a pair by name", {**valid, "text_pair": "a good story"}, 400)

    # Encodings that cannot be read.
    for value, status in ((5, 422), ("%", 400), ("YQ", 400), ("/w==", 400), ("", 400)):
        document(f"base64 {value!r}", {"instances": [{"data": {"b64": value}}]}, status)
    for charset in (
        "idna",
        "punycode",
        "unicode_escape",
        "utf-7",
        "hex",
        "rot13",
        "nonsense",
        "x" * 99,
    ):
        for kind in ("text/plain", "application/octet-stream"):
            add("charset", text, 415, f"{kind}; charset={charset}")
    add("not its charset", b"\x81\x30", 400, "text/plain; charset=euc-jp")

    # Parameters.
    for name, values in _BAD_PARAMETERS[mode].items():
        for value in values:
            document(f"{name}={value!r}", {**valid, name: value}, 422)
            document(f"parameters.{name}={value!r}", {**valid, "parameters": {name: value}}, 422)
    for value in (1, "a", [], True):
        document(f"parameters={value!r}", {**valid, "parameters": value}, 422)
    document("unknown parameter", {**valid, "parameters": {"temperature": 1}}, 400)
    document("parameter twice", {**valid, named: 1, "parameters": {named: 2}}, 400)
    document("unknown outer key", {"inputs": valid, "model": "x"}, 400)
    document("inputs is a number", {"inputs": 5}, 422)
    document("inputs is empty", {"inputs": []}, 422)

    # KServe v1.
    for value in (1, "a", {}, None):
        document(f"instances={value!r}", {"instances": value}, 422)
    document("no instance", {"instances": []}, 422)
    document("bad instance", {"instances": [valid, 5]}, 422)
    document("unknown key beside instances", {"instances": [valid], "signature": "x"}, 400)

    # Open Inference Protocol v2.
    def tensor(**changes: object) -> dict[str, object]:
        base = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a warm film"]}
        return {k: v for k, v in {**base, **changes}.items() if v is not ...}

    tensors = [tensor()]
    if mode == "question_answering":
        tensors = [tensor(name="question"), tensor(name="context")]
        document("v2 without context", {"inputs": tensors[:1]}, 422)
        document("v2 with a third input", {"inputs": [*tensors, tensor(name="x")]}, 422)
    rest = tensors[1:]
    first = tensors[0]["name"]
    for key in ("name", "shape", "datatype", "data"):
        if key in ("shape", "datatype"):
            continue
        document(f"v2 without {key}", {"inputs": [tensor(**{"name": first, key: ...}), *rest]}, 400)
    for changes, status in (
        ({"datatype": "FP32"}, 422),
        ({"datatype": "bytes"}, 422),
        ({"shape": [2]}, 422),
        ({"shape": []}, 422),
        ({"shape": [-1]}, 422),
        ({"shape": ["1"]}, 422),
        ({"shape": [True]}, 422),
        ({"shape": 1}, 422),
        ({"shape": [0], "data": []}, 422),
        ({"data": "a"}, 422),
        ({"data": [1]}, 422),
        ({"data": [None]}, 422),
        ({"data": [""]}, 422),
        ({"data": ["a", "b"]}, 422),
        ({"data": [["a"], "b"], "shape": [2]}, 422),
        ({"name": 5}, 422),
        ({"extra": 1}, 400),
        ({"parameters": 1}, 422),
        ({"parameters": {"binary_data_size": 4}, "data": ...}, 400),
        ({"parameters": {"binary_data_size": 4}}, 400),
        ({"parameters": {"binary_data_size": "4"}}, 422),
        ({"parameters": {"content_type": "base64"}}, 422),
        ({"parameters": {"content_type": []}}, 422),
        ({"parameters": {"shared_memory_region": "x"}}, 422),
    ):
        document(f"v2 {changes}", {"inputs": [tensor(**{"name": first, **changes}), *rest]}, status)
    for key in ("content_type", "temperature"):
        document(f"v2 bad {key}", {"inputs": tensors, "parameters": {key: "base64"}},
                 422 if key == "content_type" else 400)  # fmt: skip
    wanted = [{"name": "score", "parameters": {"classification": 2}}]
    document("v2 output as classes", {"inputs": tensors, "outputs": wanted}, 422)
    document("v2 twice the same name", {"inputs": [*tensors, tensor(name=first)]}, 400)
    document("v2 mixed inputs", {"inputs": [*tensors, "a"]}, 422)
    document("v2 id is a number", {"id": 5, "inputs": tensors}, 422)
    document("v2 unknown key", {"inputs": tensors, "model": "x"}, 400)
    document("v2 unknown parameter", {"inputs": tensors, "parameters": {"x": 1}}, 400)
    document("v2 outputs is an object", {"inputs": tensors, "outputs": {}}, 422)
    document("v2 unknown output", {"inputs": tensors, "outputs": [{"name": "logits"}]}, 422)
    return out


CASES: dict[str, list[Case]] = {mode: _cases(mode) for mode in MODES}
