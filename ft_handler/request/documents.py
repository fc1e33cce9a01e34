"""Documents to inputs: every form of payload, understood or refused.

A body is text, bytes, or what a JSON parser made of them: one input, a list, KServe's v1
`instances`, or Open Inference tensors, with parameters beside the input or under a key of their
own. No message written here quotes the client's text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import orjson

from ft_handler.config import spelled
from ft_handler.errors import MalformedRequest, RequestTooLarge, UnusableRequest
from ft_handler.request.forms import (
    INSTANCES,
    LISTED,
    SINGLE,
    TRUNCATED,
    Form,
    OpenInference,
)
from ft_handler.request.literals import parse_literal
from ft_handler.request.open_inference import is_tensors, rows_of, wanted_outputs
from ft_handler.request.parameters import ParameterReader
from ft_handler.request.texts import checked_name, checked_text, is_plain, utf8
from ft_handler.tasks.base import ParamsT, Task
from ft_handler.types import Incoming, InputT

#: What can only be the beginning of a list: a text may begin with a bracket as well.
_LIST_START = re.compile(r"\s*\[\s*(?:[\"'\[{\]]|$)")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may bring: inputs in its list, characters in a text."""

    inputs: int
    chars: int


@dataclass(slots=True)
class Request(Generic[InputT]):
    """One client's request: its inputs, and the form its answer takes."""

    inputs: Sequence[InputT]
    form: Form


class Decoder(Generic[InputT, ParamsT]):
    """Decodes requests for one task.

    defaults  parameters of a request that gives none
    model     the model's name and version, for Open Inference answers
    """

    def __init__(
        self,
        task: Task[InputT, ParamsT, Any, Any],
        defaults: ParamsT,
        limits: Limits,
        model: Mapping[str, str],
    ) -> None:
        self._task = task
        self._defaults = defaults
        self._limits = limits
        self._most_chars = limits.chars
        self._model = dict(model)
        self._parameters = ParameterReader(task.parameters, task.nulls)
        self._texts = (*task.required, *task.optional)
        self._keys = frozenset((*self._texts, *task.ignored))
        self._wanted = " and ".join(f"'{key}'" for key in task.required)
        self._known = ", ".join(
            (*self._texts, *task.ignored, *self._parameters.names, "parameters")
        )
        self._parameter_names = frozenset((*self._parameters.names, "parameters"))

    def decode(self, incoming: Incoming) -> Request[InputT]:
        """What one client asks; raises RequestError."""
        if not incoming.fields:
            return self._payload(incoming.body, self._defaults)
        fields: dict[str, object] = {}
        for name, value in incoming.fields.items():
            value = utf8(value) if isinstance(value, (bytes, bytearray)) else value
            fields[name] = _scalar(value) if name in self._parameter_names else value
        if incoming.body is not None:
            return self._payload(incoming.body, self._read(fields, self._defaults, ""))
        return Request((self._input(fields, self._defaults, ""),), SINGLE)

    # -- what a body is --

    def _payload(self, value: object, params: ParamsT) -> Request[InputT]:
        if isinstance(value, (bytes, bytearray)):
            value = utf8(value)
        if not isinstance(value, str):
            return self._document(value, params)
        value = value.removeprefix("\ufeff")
        start = value.lstrip()[:1]
        if start in ("{", "["):
            return self._structured(value, start, params)
        if not start:
            raise MalformedRequest("the body is empty")
        return self._bare(value, params)

    def _bare(self, text: str, params: ParamsT) -> Request[InputT]:
        if self._task.bare is None:
            raise MalformedRequest(f"the body must be an object with {self._wanted}")
        if is_plain(text, self._most_chars):
            return Request((self._task.read({self._task.bare: text}, params),), SINGLE)
        return Request((self._of_texts({self._task.bare: text}, params, ""),), SINGLE)

    def _structured(self, text: str, start: str, params: ParamsT) -> Request[InputT]:
        try:
            document: object = orjson.loads(text)
        except orjson.JSONDecodeError:
            try:
                document = parse_literal(text)
            except ValueError:
                # A sentence may begin with a bracket: "[laughs] what a film".
                if start == "[" and self._task.bare and not _LIST_START.match(text):
                    return self._bare(text, params)
                raise MalformedRequest("the body is not valid JSON") from None
        return self._document(document, params)

    def _document(self, document: object, params: ParamsT) -> Request[InputT]:
        if isinstance(document, list):
            return Request(self._inputs(document, params, "inputs"), LISTED)
        if not isinstance(document, dict):
            raise UnusableRequest("the body must be text, an object or a list of inputs")
        if "inputs" in document:
            inputs = document["inputs"]
            if is_tensors(inputs):
                return self._tensors(document, inputs, params)
            params = self._beside(document, ("inputs",), params)
            if isinstance(inputs, list):
                return Request(self._inputs(inputs, params, "inputs"), LISTED)
            return Request((self._input(inputs, params, ""),), SINGLE)
        if "instances" in document:
            params = self._beside(document, ("instances",), params)
            instances = document["instances"]
            if not isinstance(instances, list):
                raise UnusableRequest("'instances' must be a list")
            return Request(self._inputs(instances, params, "instances"), INSTANCES)
        return Request((self._input(document, params, ""),), SINGLE)

    def _tensors(
        self, document: dict[str, Any], tensors: Sequence[object], params: ParamsT
    ) -> Request[InputT]:
        params = self._beside(document, ("id", "inputs", "outputs"), params)
        model = self._model
        if document.get("id") is not None:
            model = {**model, "id": checked_name(document["id"], "'id'")}
        rows = rows_of(self._task, tensors)
        inputs = self._inputs(rows, params, "data")
        columns = self._task.columns_of
        wanted = wanted_outputs(document.get("outputs"), (*columns, TRUNCATED))
        return Request(inputs, OpenInference(model, columns, wanted))

    # -- inputs and parameters --

    def _inputs(self, values: Sequence[object], params: ParamsT, name: str) -> list[InputT]:
        if not values:
            raise UnusableRequest("the list of inputs is empty")
        if len(values) > self._limits.inputs:
            raise RequestTooLarge(
                f"the request has {len(values)} inputs, the limit is {self._limits.inputs}"
            )
        return [self._input(v, params, f"{name}[{i}]: ") for i, v in enumerate(values)]

    def _input(self, value: object, params: ParamsT, where: str) -> InputT:
        if isinstance(value, dict) and "data" in value:
            # TorchServe's KServe samples wrap each instance: {"data": ...}.
            params = self._beside(value, ("data", *self._task.ignored), params, where)
            value = value["data"]
        bare = self._task.bare
        if isinstance(value, str) and bare:
            return self._of_texts({bare: value}, params, where)
        if not isinstance(value, dict):
            what = ("a string or " if bare else "") + f"an object with {self._wanted}"
            raise UnusableRequest(f"{where}an input must be {what}")
        for key in self._task.required:
            if key not in value:
                raise MalformedRequest(f"{where}the input has no '{key}'")
        if not value.keys() <= self._keys:
            params = self._beside(value, self._keys, params, where)
        return self._of_texts(value, params, where)

    def _of_texts(self, texts: Mapping[str, object], params: ParamsT, where: str) -> InputT:
        checked: dict[str, str] = {}
        for key in self._texts:
            value = texts.get(key)
            if is_plain(value, self._most_chars):
                checked[key] = value
            elif value is not None or key in self._task.required:
                checked[key] = checked_text(value, f"{where}'{key}'", self._most_chars)
        return self._task.read(checked, params)

    def _beside(
        self,
        document: Mapping[str, object],
        own: frozenset[str] | tuple[str, ...],
        params: ParamsT,
        where: str = "",
    ) -> ParamsT:
        """The parameters among a document's keys, `own` being what else it holds."""
        rest = {name: value for name, value in document.items() if name not in own}
        return self._read(rest, params, where) if rest else params

    def _read(self, given: Mapping[str, object], defaults: ParamsT, where: str) -> ParamsT:
        nested = given.get("parameters")
        outer = {name: value for name, value in given.items() if name != "parameters"}
        if nested is not None:
            if not isinstance(nested, dict):
                raise UnusableRequest(f"{where}'parameters' must be an object")
            if outer.keys() & nested.keys():
                raise MalformedRequest(f"{where}a parameter is given twice")
            outer |= nested
        if not outer.keys() <= self._parameter_names - {"parameters"}:
            raise MalformedRequest(f"{where}unknown key; known keys: {self._known}")
        return self._parameters.read(outer, defaults, where)


def _scalar(value: object) -> object:
    """A form field's text as the JSON scalar it spells, else the text itself."""
    return spelled(value.strip() if isinstance(value, str) else value)
