"""Requests nobody should send, as hypothesis makes them: near documents of every kind."""

from __future__ import annotations

import gzip
import json
import struct
from typing import Any, NamedTuple

from hypothesis import strategies as st

TEXTS = (
    "the film", "who built it", "", " ", "a\0b", "caf\u00e9", "[[x]]", "{'a'", "\u3000", "#" * 300
)  # fmt: skip
KEYS = (
    "text", "text_pair", "question", "context", "data", "b64", "target", "inputs", "instances",
    "parameters", "options", "padding", "top_k", "topk", "return_all_scores", "truncation",
    "max_length", "function_to_apply", "doc_stride", "max_seq_len", "max_question_len",
    "max_answer_len", "handle_impossible_answer", "align_to_words", "id", "outputs", "name",
    "shape", "datatype", "content_type", "binary_data_size", "model_name", "unknown key",
)  # fmt: skip
WORDS = ("BYTES", "FP32", "softmax", "NONE", "only_first", "only_second", "score", "YQ==", "np")
TYPES = (
    None, "text/plain", "application/json", "application/octet-stream",
    "text/plain; charset=utf-16", "application/json; charset=latin1",
    "text/html; charset=nonsense", "application/x+json", ";;=",
)  # fmt: skip

SCALARS = (
    st.none() | st.booleans() | st.sampled_from((0, 1, 2, 3, 5, 12, -1, 10**30, 0.5, float("nan")))
    | st.sampled_from(TEXTS + WORDS) | st.text(max_size=5)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS), v, max_size=4),
    max_leaves=8,
)
PARAMETERS = st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=2)


class Odd(NamedTuple):
    """An HTTP request's body and the headers it comes with."""

    body: bytes
    headers: dict[str, str]


def _texts(mode: str) -> st.SearchStrategy[Any]:
    good = st.sampled_from(TEXTS[:2])
    text = st.one_of(good, good, good, good, st.sampled_from(TEXTS) | SCALARS)
    if mode == "question_answering":
        return st.fixed_dictionaries({"question": text | st.lists(text), "context": text})
    return st.fixed_dictionaries({"text": text}, optional={"text_pair": text}) | text


def documents(mode: str) -> st.SearchStrategy[Any]:
    """Documents in every form that is understood, with a value or a key that may be wrong."""
    one = _texts(mode)
    tensor = st.fixed_dictionaries(
        {
            "name": st.sampled_from(("text", "question", "context")),
            "shape": st.sampled_from(([1], [2], [1, 2], [0], [-1], 1)),
            "datatype": st.sampled_from(("BYTES", "BYTES", "FP32")),
            "data": st.lists(st.sampled_from(TEXTS), max_size=2),
        },
        optional={"parameters": st.none() | PARAMETERS},
    )
    shapes = (
        one
        | st.lists(one | st.tuples(one, one).map(list), max_size=3)
        | one.map(lambda v: {"data": v})
        | st.fixed_dictionaries({"inputs": one | st.lists(one, max_size=3) | st.lists(tensor)})
        | st.fixed_dictionaries({"instances": st.lists(one, max_size=3) | SCALARS})
    )
    more = st.just({}) | PARAMETERS
    return st.tuples(shapes, more, st.booleans()).map(
        lambda t: (
            {**t[0], **({"parameters": t[1]} if t[2] else t[1])} if isinstance(t[0], dict) else t[0]
        )
    ) | VALUES  # fmt: skip


def _written(document: Any, how: str, cut: int) -> bytes:
    text = repr(document) if how == "literal" else json.dumps(document)
    body = text.encode("utf-16" if how == "utf-16" else "utf-8", "replace")
    if how == "cut":
        body = body[: cut % (len(body) + 1)]
    return gzip.compress(body) if how == "gzip" else body


@st.composite
def odd_requests(draw: st.DrawFn, mode: str) -> Odd:
    """A request that may be anything between good and noise."""
    kinds = st.sampled_from(("json", "json", "json", "literal", "cut", "utf-16", "gzip", "binary"))
    how = draw(kinds)
    content_type = draw(st.sampled_from(TYPES))
    headers = {} if content_type is None else {"Content-Type": content_type}
    if how == "gzip" and draw(st.booleans()):
        headers["Content-Encoding"] = "gzip"
    if how == "binary":
        data = draw(st.binary(max_size=12))
        size = draw(st.integers(0, 20))
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES",
                  "parameters": {"binary_data_size": size}}  # fmt: skip
        head = json.dumps({"inputs": [tensor]}).encode()
        headers["Inference-Header-Content-Length"] = str(len(head) + draw(st.integers(-1, 1)))
        return Odd(head + struct.pack("<I", len(data)) + data, headers)
    if draw(st.integers(0, 9)) == 0:
        return Odd(draw(st.binary(max_size=30)), headers)
    return Odd(_written(draw(documents(mode)), how, draw(st.integers(0, 400))), headers)
