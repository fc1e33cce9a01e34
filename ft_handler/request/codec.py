"""Bytes to Request, Prediction to response: every payload form, understood or refused.

What TorchServe hands over is a dict a request: `{"body": ...}`, `{"data": ...}` or form fields,
holding text, bytes or parsed JSON. No message written here quotes the client's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from ft_handler.config import FUNCTIONS, HandlerConfig
from ft_handler.errors import (
    MalformedRequest,
    RequestError,
    RequestTooLarge,
    UnusableRequest,
)
from ft_handler.request.literals import parse_literal
from ft_handler.types import (
    ClassificationParams,
    ModelInput,
    Prediction,
    QuestionInput,
    QuestionParams,
    Reply,
    Request,
    TextInput,
)

#: `top_k` of a request that asks for every label.
ALL_LABELS = 0

_Params = ClassificationParams | QuestionParams
_PAYLOAD_FIELDS = ("body", "data")

# -- parameters ----------------------------------------------------------------------------------


#: Bounds the table of spans that one question may ask for.
_MOST_ANSWERS = 100


def _whole(name: str, low: int, high: int = 2**31 - 1) -> Callable[[object], int]:
    bound = f"of at least {low}" + (f" and at most {high}" if high < 2**31 - 1 else "")

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UnusableRequest(f"'{name}' must be an integer {bound}")
        return value

    return read


def _flag(name: str) -> Callable[[object], bool]:
    def read(value: object) -> bool:
        if not isinstance(value, bool):
            raise UnusableRequest(f"'{name}' must be true or false")
        return value

    return read


def _all_or_whole(value: object) -> int:
    return ALL_LABELS if value is None else _whole("top_k", 1)(value)


def _function(value: object) -> str:
    if not isinstance(value, str) or value not in FUNCTIONS:
        raise UnusableRequest("'function_to_apply' must be one of " + ", ".join(FUNCTIONS))
    return value


#: A client's parameter -> (field of the parameter class, reader).
_CLASSIFICATION: Mapping[str, tuple[str, Callable[[object], object]]] = {
    "top_k": ("top_k", _all_or_whole),
    "function_to_apply": ("function", _function),
    "truncation": ("truncation", _flag("truncation")),
}
_QUESTION: Mapping[str, tuple[str, Callable[[object], object]]] = {
    "top_k": ("top_k", _whole("top_k", 1, _MOST_ANSWERS)),
    "doc_stride": ("doc_stride", _whole("doc_stride", 0)),
    "max_answer_len": ("max_answer_len", _whole("max_answer_len", 1)),
    "max_seq_len": ("max_seq_len", _whole("max_seq_len", 4)),
    "max_question_len": ("max_question_len", _whole("max_question_len", 1)),
    "handle_impossible_answer": (
        "handle_impossible_answer",
        _flag("handle_impossible_answer"),
    ),
    "align_to_words": ("align_to_words", _flag("align_to_words")),
}


def _form_value(value: Any) -> Any:
    """A form field's text as the JSON scalar it spells, else the text itself."""
    if isinstance(value, (bytes, bytearray)):
        value = _utf8(value)
    if isinstance(value, str):
        text = value.strip()
        if text in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[text]
        if re.fullmatch(r"-?[0-9]{1,9}", text):
            return int(text)
        return text
    return value


# -- the codec -----------------------------------------------------------------------------------


def _utf8(value: bytes | bytearray) -> str:
    try:
        return value.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise MalformedRequest("the text is not valid UTF-8") from None


class Codec:
    """Decodes requests for one task and encodes its answers."""

    def __init__(
        self,
        mode: str,
        defaults: _Params,
        config: HandlerConfig,
        model_name: str = "model",
        model_version: str | None = None,
    ) -> None:
        self._question = mode == "question_answering"
        self._defaults = defaults
        self._readers = _QUESTION if self._question else _CLASSIFICATION
        self._max_inputs = config.max_inputs_per_request
        self._max_chars = config.max_text_chars
        self._model_name = model_name
        self._model_version = model_version
        required = ("question", "context") if self._question else ("text",)
        self._required = required
        optional = () if self._question else ("text_pair", "target")
        self._keys = frozenset((*required, *optional))
        self._wanted = " and ".join(f"'{name}'" for name in required)
        self._known = ", ".join((*required, *optional, *self._readers, "parameters"))

    # -- decoding --

    def decode(self, item: Mapping[str, Any]) -> Request:
        """One element of TorchServe's `data` as a Request; raises RequestError."""
        if len(item) == 1:
            for name in _PAYLOAD_FIELDS:
                if name in item:
                    return self._payload(item[name], self._defaults)
        return self._form(item)

    def _payload(self, value: Any, params: _Params) -> Request:
        if isinstance(value, (bytes, bytearray)):
            value = _utf8(value)
        if isinstance(value, str):
            value = value.removeprefix("\ufeff")
            start = value.lstrip()[:1]
            if start in ("{", "["):
                return self._structured(value, start, params)
            if not start:
                raise MalformedRequest("the body is empty")
            if isinstance(params, QuestionParams):
                raise MalformedRequest(f"the body must be an object with {self._wanted}")
            return Request((TextInput(self._text(value, "text"), None, params),))
        if isinstance(value, (dict, list)):
            return self._document(value, params)
        raise UnusableRequest("the body must be text, an object or a list of inputs")

    def _structured(self, text: str, start: str, params: _Params) -> Request:
        try:
            document: object = orjson.loads(text)
        except orjson.JSONDecodeError:
            try:
                document = parse_literal(text)
            except ValueError:
                # A sentence may begin with a bracket: "[laughs] what a film".
                if (
                    start == "["
                    and isinstance(params, ClassificationParams)
                    and not _LIST_START.match(text)
                ):
                    return Request((TextInput(self._text(text, "text"), None, params),))
                raise MalformedRequest("the body is not valid JSON") from None
        return self._document(document, params)

    def _form(self, item: Mapping[str, Any]) -> Request:
        if not item:
            raise MalformedRequest(
                "the form has no field; send plain text with Content-Type: text/plain"
            )
        payloads = [name for name in _PAYLOAD_FIELDS if name in item]
        if len(payloads) > 1:
            raise MalformedRequest("send either 'body' or 'data', not both")
        fields: dict[str, Any] = {}
        for name, value in item.items():
            if name in self._readers:
                fields[name] = _form_value(value)
            elif name not in payloads:
                text = isinstance(value, (bytes, bytearray))
                fields[name] = _utf8(value) if text else value
        if payloads:
            return self._payload(item[payloads[0]], self._params(fields, self._defaults, ""))
        return Request((self._input(fields, self._defaults, ""),))

    def _document(self, document: object, params: _Params) -> Request:
        if isinstance(document, list):
            return Request(self._inputs(document, params, "inputs"), "list")
        if not isinstance(document, dict):
            raise UnusableRequest("the body must be text, an object or a list of inputs")
        if "inputs" in document:
            inputs = document["inputs"]
            if isinstance(inputs, list) and any(
                isinstance(i, dict) and ("datatype" in i or "shape" in i) for i in inputs
            ):
                return self._v2(document, inputs, params)
            params = self._outer_params(document, ("inputs",), params)
            if isinstance(inputs, list):
                return Request(self._inputs(inputs, params, "inputs"), "list")
            return Request((self._input(inputs, params, ""),))
        if "instances" in document:
            params = self._outer_params(document, ("instances",), params)
            instances = document["instances"]
            if not isinstance(instances, list):
                raise UnusableRequest("'instances' must be a list")
            return Request(self._inputs(instances, params, "instances"), "instances")
        return Request((self._input(document, params, ""),))

    def _v2(self, document: dict[str, Any], tensors: list[Any], params: _Params) -> Request:
        params = self._outer_params(document, ("id", "inputs", "outputs"), params)
        id_ = document.get("id")
        if id_ is not None:
            id_ = self._string(id_, "'id'")
        columns: dict[str, list[str]] = {}
        for position, tensor in enumerate(tensors):
            name, data = self._tensor(tensor, f"inputs[{position}]")
            if name in columns:
                raise MalformedRequest("two inputs have the same name")
            columns[name] = data
        names = set(columns)
        if self._question or len(columns) > 1:
            wanted = {"question", "context"} if self._question else {"text", "text_pair"}
            if names != wanted:
                listed = " and ".join(f"'{n}'" for n in sorted(wanted, reverse=self._question))
                raise UnusableRequest(f"the inputs must be named {listed}")
        rows: list[dict[str, str]]
        if len(columns) == 1:
            rows = [{"text": text} for text in next(iter(columns.values()))]
        else:
            if len({len(column) for column in columns.values()}) > 1:
                raise UnusableRequest("the inputs must have the same shape")
            rows = [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
        return Request(self._inputs(rows, params, "data"), "v2", id_, self._v2_outputs(document))

    def _tensor(self, tensor: object, where: str) -> tuple[str, list[str]]:
        if not isinstance(tensor, dict):
            raise UnusableRequest(f"{where} must be an object")
        if not tensor.keys() <= {"name", "shape", "datatype", "data", "parameters"}:
            raise MalformedRequest(f"{where} has an unknown key")
        missing = {"name", "shape", "datatype", "data"} - tensor.keys()
        if missing:
            raise MalformedRequest(f"{where} has no '{sorted(missing)[0]}'")
        parameters = tensor.get("parameters", {})
        if not isinstance(parameters, dict):
            raise UnusableRequest(f"{where}.parameters must be an object")
        if "binary_data_size" in parameters:
            raise UnusableRequest(f"{where}: the binary tensor extension is not supported")
        if parameters.get("content_type", "str") != "str" or not parameters.keys() <= {
            "content_type"
        }:
            raise UnusableRequest(f"{where}.parameters may only hold content_type 'str'")
        if tensor["datatype"] != "BYTES":
            raise UnusableRequest(f"{where}.datatype must be BYTES")
        shape, data = tensor["shape"], tensor["data"]
        if not isinstance(data, list):
            raise UnusableRequest(f"{where}.data must be a list")
        if (
            not isinstance(shape, list)
            or not 1 <= len(shape) <= 8
            or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
        ):
            raise UnusableRequest(f"{where}.shape must be a list of non-negative integers")
        if any(isinstance(value, list) for value in data):
            if not all(isinstance(value, list) for value in data):
                raise UnusableRequest(f"{where}.data mixes strings and lists")
            data = [text for row in data for text in row]
        size = 1
        for n in shape:
            size *= n
        if size != len(data):
            raise UnusableRequest(f"{where}.data does not have as many elements as its shape says")
        return self._string(tensor["name"], f"{where}.name"), data

    def _v2_outputs(self, document: dict[str, Any]) -> tuple[str, ...] | None:
        wanted = document.get("outputs")
        if wanted is None:
            return None
        offered = self._v2_names()
        if not isinstance(wanted, list) or not all(isinstance(o, dict) for o in wanted):
            raise UnusableRequest("'outputs' must be a list of objects")
        names = [o.get("name") for o in wanted]
        if not all(isinstance(n, str) and n in offered for n in names):
            raise UnusableRequest("'outputs' may name " + ", ".join(offered))
        return tuple(dict.fromkeys(names))

    def _outer_params(
        self, document: dict[str, Any], own: Sequence[str], params: _Params
    ) -> _Params:
        rest = {name: value for name, value in document.items() if name not in own}
        return self._params(rest, params, "") if rest else params

    def _inputs(self, values: Sequence[Any], params: _Params, name: str) -> list[ModelInput]:
        if not values:
            raise UnusableRequest("the list of inputs is empty")
        if len(values) > self._max_inputs:
            raise RequestTooLarge(
                f"the request has {len(values)} inputs, the limit is {self._max_inputs}"
            )
        return [self._input(v, params, f"{name}[{i}]: ") for i, v in enumerate(values)]

    def _input(self, value: object, params: _Params, where: str) -> ModelInput:
        if isinstance(value, dict) and "data" in value:
            # TorchServe's KServe samples wrap each instance: {"data": ...}.
            rest = {k: v for k, v in value.items() if k != "data"}
            params = self._params(rest, params, where) if rest else params
            value = value["data"]
        if isinstance(value, str) and isinstance(params, ClassificationParams):
            return TextInput(self._text(value, "text", where), None, params)
        if not isinstance(value, dict):
            what = f"an object with {self._wanted}"
            what = what if self._question else "a string or " + what
            raise UnusableRequest(f"{where}an input must be {what}")
        for name in self._required:
            if name not in value:
                raise MalformedRequest(f"{where}the input has no '{name}'")
        if not value.keys() <= self._keys:
            rest = {k: v for k, v in value.items() if k not in self._keys}
            params = self._params(rest, params, where)
        if isinstance(params, QuestionParams):
            return QuestionInput(
                self._text(value["question"], "question", where),
                self._text(value["context"], "context", where),
                params,
            )
        pair = value.get("text_pair")
        return TextInput(
            self._text(value["text"], "text", where),
            None if pair is None else self._text(pair, "text_pair", where),
            params,
        )

    def _params(self, given: Mapping[str, Any], defaults: _Params, where: str) -> _Params:
        nested = given.get("parameters")
        if nested is not None:
            if not isinstance(nested, dict):
                raise UnusableRequest(f"{where}'parameters' must be an object")
            outer = {k: v for k, v in given.items() if k != "parameters"}
            if outer.keys() & nested.keys():
                raise MalformedRequest(f"{where}a parameter is given twice")
            given = {**outer, **nested}
        elif "parameters" in given:
            given = {k: v for k, v in given.items() if k != "parameters"}
        changes: dict[str, object] = {}
        for name, value in given.items():
            known = self._readers.get(name)
            if known is None:
                raise MalformedRequest(f"{where}unknown key; known keys: {self._known}")
            if value is None and (self._question or name != "top_k"):
                continue
            try:
                changes[known[0]] = known[1](value)
            except RequestError as error:
                raise type(error)(f"{where}{error}") from None
        return replace(defaults, **changes) if changes else defaults  # type: ignore[arg-type]

    def _string(self, value: object, what: str) -> str:
        if not isinstance(value, str):
            raise UnusableRequest(f"{what} must be a string")
        if len(value) > 1024:
            raise RequestTooLarge(f"{what} is longer than 1024 characters")
        if not value.isascii():
            _encodable(value, f"{what}")
        return value

    def _text(self, value: object, name: str, where: str = "") -> str:
        if not isinstance(value, str):
            raise UnusableRequest(f"{where}'{name}' must be a string")
        if len(value) > self._max_chars:
            raise RequestTooLarge(
                f"{where}'{name}' has {len(value)} characters, the limit is {self._max_chars}"
            )
        if not value.isascii():
            _encodable(value, f"{where}'{name}'")
        if "\0" in value:
            raise MalformedRequest(f"{where}'{name}' holds a null character")
        if not value or value.isspace():
            raise UnusableRequest(f"{where}'{name}' is empty")
        return value

    # -- encoding --

    def encode(self, request: Request, predictions: Sequence[Prediction]) -> Reply:
        """The predictions of one request's inputs, in its own form."""
        form = request.form
        document: object
        if form == "single":
            document = predictions[0]
        elif form == "list":
            document = list(predictions)
        elif form == "instances":
            document = {"predictions": list(predictions)}
        else:
            document = self._v2_document(request, predictions)
        return Reply(200, "OK", orjson.dumps(document))

    def _v2_names(self) -> tuple[str, ...]:
        fields = ("answer", "score", "start", "end") if self._question else ("label", "score")
        return (*fields, "truncated")

    def _v2_document(
        self, request: Request, predictions: Sequence[Prediction]
    ) -> dict[str, object]:
        rows = [p if isinstance(p, list) else [p] for p in predictions]
        width = max(len(row) for row in rows)
        shape = [len(rows)] + [width] * any(isinstance(p, list) for p in predictions)
        outputs = []
        for name in self._v2_names():
            if request.outputs is not None and name not in request.outputs:
                continue
            datatype, absent = _V2_TYPES[name]
            data = [row[i].get(name, absent) if i < len(row) else absent
                    for row in rows for i in range(width)]  # fmt: skip
            if name == "truncated" and request.outputs is None and not any(data):
                continue
            outputs.append({"name": name, "shape": shape, "datatype": datatype, "data": data})
        head: dict[str, object] = {"model_name": self._model_name}
        if self._model_version is not None:
            head["model_version"] = self._model_version
        if request.id is not None:
            head["id"] = request.id
        return {**head, "outputs": outputs}


_LIST_START = re.compile(r"\s*\[\s*(?:[\"'\[{\]]|$)")
_V2_TYPES: Mapping[str, tuple[str, object]] = {
    "label": ("BYTES", ""),
    "answer": ("BYTES", ""),
    "score": ("FP32", 0.0),
    "start": ("INT64", 0),
    "end": ("INT64", 0),
    "truncated": ("BOOL", False),
}


def _encodable(value: str, what: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MalformedRequest(f"{what} holds a lone surrogate") from None


def encode_error(error: RequestError) -> Reply:
    """The answer to a refused request: `{"code", "type", "message"}`."""
    body = {"code": error.status, "type": error.type, "message": str(error)}
    return Reply(error.status, error.reason, orjson.dumps(body))
