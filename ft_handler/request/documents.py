"""Documents to inputs: every form of payload, understood or refused.

A body is text, bytes, or what a JSON parser made of them: one input, a list, KServe's v1
`instances`, or Open Inference tensors, with parameters beside the input or under a key of their
own. No message written here quotes the client's text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from ft_handler.config import spelled
from ft_handler.errors import MalformedRequest, RequestTooLarge, UnusableRequest
from ft_handler.request.bodies import parse_json, read_body, read_text
from ft_handler.request.forms import (
    LISTED,
    NESTED,
    SINGLE,
    TRUNCATED,
    Instances,
    OpenInference,
)
from ft_handler.request.open_inference import (
    is_tensors,
    model_parameters,
    rows_of,
    wanted_outputs,
)
from ft_handler.request.parameters import ParameterReader
from ft_handler.request.texts import checked_name, checked_text, is_plain, is_word, utf8
from ft_handler.tasks.base import ParamsT, Task
from ft_handler.types import Form, Incoming, InputT

#: What clients of Hugging Face's servers send along and nothing here depends on.
_UNUSED = frozenset({"options", "padding"})
#: Keys of an Open Inference request that hold no parameter; KServe's client repeats the model.
_TENSOR_KEYS = frozenset({"id", "inputs", "outputs", "parameters", "model_name", "model_version"})

_NO_INPUTS = "the list of inputs is empty"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may bring: inputs in its list, characters in a text.

    texts  in the list of one input; None is as many as `inputs`
    """

    inputs: int
    chars: int
    texts: int | None = None


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
        self._most_texts = limits.texts or limits.inputs
        self._model = dict(model)
        self._parameters = ParameterReader(task.parameters, task.nulls, task.aliases)
        listed = {k: v for k, v in task.listed.items() if getattr(defaults, k) is None}
        self._listed: ParamsT = replace(defaults, **listed) if listed else defaults  # type: ignore[type-var]
        # Key -> whether its value is a list of texts.
        self._texts = {key: key in task.lists for key in (*task.required, *task.optional)}
        self._texts |= {key: self._texts[own] for key, own in task.synonyms.items()}
        self._keys_for = {
            key: (key, *(other for other, own in task.synonyms.items() if own == key))
            for key in task.required
        }
        self._keys = frozenset((*self._texts, *task.ignored))
        # An object of these alone, all of them plain texts, is one input to every task.
        plain = not set(task.required) & set(task.lists)
        self._usual = frozenset(task.required) if plain else frozenset(("",))
        self._wanted = " and ".join(f"'{key}'" for key in task.required)
        self._known = ", ".join(
            (
                *self._texts,
                *task.ignored,
                *self._parameters.names,
                "parameters",
                "inputs",
                "instances",
            )
        )
        self._parameter_names = self._parameters.accepted | {"parameters"} | _UNUSED

    def decode(self, incoming: Incoming) -> Request[InputT]:
        """What one client asks; raises RequestError."""
        if not incoming.fields:
            return self._payload(incoming, self._defaults)
        fields: dict[str, object] = {}
        for name, value in incoming.fields.items():
            value = utf8(value) if isinstance(value, (bytes, bytearray)) else value
            spelt = name in self._parameter_names and name not in self._task.textual
            fields[name] = _scalar(value) if spelt else value
        if incoming.body is not None:
            return self._payload(incoming, self._read(fields, self._defaults, ""))
        return Request((self._input(fields, self._defaults, ""),), SINGLE)

    # -- what a body is --

    def _payload(self, incoming: Incoming, params: ParamsT) -> Request[InputT]:
        body, size = incoming.body, incoming.json_size
        if size is not None and isinstance(body, (bytes, bytearray)):
            if size > len(body):
                raise MalformedRequest(
                    "the body is shorter than its Inference-Header-Content-Length"
                )
            return self._document(parse_json(utf8(body[:size])), params, memoryview(body)[size:])
        value = read_body(incoming)
        if not isinstance(value, str):
            return self._document(value, params)
        if self._task.bare is None:
            raise MalformedRequest(f"the body must be an object with {self._wanted}")
        if is_plain(value, self._most_chars):
            return Request((self._task.read({self._task.bare: value}, params),), SINGLE)
        return Request((self._of_texts({self._task.bare: value}, params, ""),), SINGLE)

    def _document(
        self, document: object, params: ParamsT, binary: memoryview | None = None
    ) -> Request[InputT]:
        if isinstance(document, list):
            return Request(self._inputs(document, params, "inputs"), LISTED)
        if not isinstance(document, dict):
            raise UnusableRequest("the body must be text, an object or a list of inputs")
        if document.keys() == self._usual:
            for text in document.values():
                if not is_plain(text, self._most_chars):
                    break
            else:
                return Request((self._task.read(document, params),), SINGLE)
        if (foreign := self._task.foreign(document)) is not None:
            params = self._read(foreign.parameters, params, "") if foreign.parameters else params
            name = "inputs" if foreign.form.many else ""
            return Request(self._inputs(foreign.inputs, params, name), foreign.form)
        if "inputs" in document:
            inputs = document["inputs"]
            if is_tensors(inputs):
                return self._tensors(document, inputs, params, binary)
            if inputs == []:  # before an `id` beside it is found to be no parameter
                raise UnusableRequest(_NO_INPUTS)
            alone = isinstance(inputs, str) and self._task.bare is not None
            if alone and params is self._defaults:
                params = self._listed
            params = self._beside(document, ("inputs",), params)
            if alone and self._task.nested:
                return Request((self._input(inputs, params, ""),), NESTED)
            if isinstance(inputs, list):
                return Request(self._inputs(inputs, params, "inputs"), LISTED)
            return self._one(inputs, params)
        if "instances" in document:
            params = self._beside(document, ("instances",), params)
            instances = document["instances"]
            if not isinstance(instances, list):
                raise UnusableRequest("'instances' must be a list")
            form = Instances(self._task.answers_as)
            return Request(self._inputs(instances, params, "instances"), form)
        return self._one(document, params)

    def _one(self, value: object, params: ParamsT) -> Request[InputT]:
        """One input, or a document that spreads out to several."""
        rows = self._task.spread(value) if isinstance(value, dict) else None
        if rows is None:
            return Request((self._input(value, params, ""),), SINGLE)
        return Request(self._inputs(rows, params, "inputs"), LISTED)

    def _tensors(
        self,
        document: dict[str, Any],
        tensors: Sequence[object],
        params: ParamsT,
        binary: memoryview | None,
    ) -> Request[InputT]:
        if not self._task.columns_of:
            raise UnusableRequest(f"{self._task.answers_as} are not answered as tensors")
        params = self._beside(document, _TENSOR_KEYS, params)
        params = self._read(model_parameters(document.get("parameters")), params, "")
        model = self._model
        if document.get("id") is not None:
            model = {**model, "id": checked_name(document["id"], "'id'")}
        rows = rows_of(self._task, tensors, binary)
        inputs = self._inputs(rows, params, "data")
        columns = self._task.columns_of
        wanted = wanted_outputs(document.get("outputs"), (*columns, TRUNCATED))
        return Request(inputs, OpenInference(model, columns, wanted))

    # -- inputs and parameters --

    def _inputs(self, values: Sequence[object], params: ParamsT, name: str) -> list[InputT]:
        """The inputs of a list, which messages call by `name` and place where it has one."""
        if not values:
            raise UnusableRequest(_NO_INPUTS)
        if len(values) > self._limits.inputs:
            raise RequestTooLarge(
                f"the request has {len(values)} inputs, the limit is {self._limits.inputs}"
            )
        return [
            self._input(v, params, f"{name}[{i}]: " if name else "") for i, v in enumerate(values)
        ]

    def _input(self, value: object, params: ParamsT, where: str) -> InputT:
        while isinstance(value, dict):
            if "data" in value:
                # TorchServe's samples wrap each input: {"data": ..., "target": ...}.
                params = self._beside(value, ("data", *self._task.ignored), params, where)
                value = value["data"]
            elif value.keys() == {"b64"}:
                value = read_text(_base64(value["b64"], where))
            else:
                break
        bare = self._task.bare
        if isinstance(value, str) and bare:
            return self._of_texts({bare: value}, params, where)
        if isinstance(value, list) and bare and self._task.optional and len(value) == 2:
            # A pair, as tokenizers and cross-encoders take it.
            value = dict(zip((bare, *self._task.optional), value, strict=False))
        if not isinstance(value, dict):
            what = ("a string or " if bare else "") + f"an object with {self._wanted}"
            raise UnusableRequest(f"{where}an input must be {what}")
        for key, names in self._keys_for.items():
            if not any(name in value for name in names):
                raise MalformedRequest(f"{where}the input has no '{key}'")
        if not value.keys() <= self._keys:
            params = self._beside(value, self._keys, params, where)
        return self._of_texts(value, params, where)

    def _of_texts(self, texts: Mapping[str, object], params: ParamsT, where: str) -> InputT:
        checked: dict[str, object] = {}
        for key, listed in self._texts.items():
            value = texts.get(key)
            if not listed and is_plain(value, self._most_chars):
                checked[key] = value
            elif value is None and (key not in texts or key not in self._task.required):
                continue
            else:
                checked[key] = self._checked(value, listed, f"{where}'{key}'")
        return self._task.read(checked, params)

    def _checked(self, value: object, listed: bool, what: str) -> str | tuple[str, ...]:
        """A text, or a list of them; raises RequestError."""
        if not listed:
            return checked_text(value, what, self._most_chars)
        separator = self._task.separator
        if separator and isinstance(value, str):
            value = [text.strip() for text in value.split(separator) if text.strip()]
        if not isinstance(value, (list, tuple)):
            raise UnusableRequest(f"{what} must be a list of strings")
        if not value:
            raise UnusableRequest(f"{what} is empty")
        if len(value) > self._most_texts:
            raise RequestTooLarge(f"{what} has {len(value)} texts, the limit is {self._most_texts}")
        # Other servers' clients may write a text as an object, with what else they know of it.
        texts = [text.get("text") if isinstance(text, dict) else text for text in value]
        return tuple(
            text
            if is_plain(text, self._most_chars)
            else checked_text(text, f"{what}[{i}]", self._most_chars)
            for i, text in enumerate(texts)
        )

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
        self._check_known(outer, where)
        if nested is not None:
            if not isinstance(nested, dict):
                raise UnusableRequest(f"{where}'parameters' must be an object")
            if outer.keys() & nested.keys():
                raise MalformedRequest(f"{where}a parameter is given twice")
            self._check_known(nested, where, "parameters")
            outer |= nested
        for name in self._task.textual:
            if outer.get(name) is not None:
                listed = name in self._task.lists
                outer[name] = self._checked(outer[name], listed, f"{where}'{name}'")
        return self._parameters.read(
            {name: value for name, value in outer.items() if name not in _UNUSED}, defaults, where
        )

    def _check_known(self, given: Iterable[str], where: str, inside: str = "") -> None:
        """Refuse a key that is none, by its name where it is a word."""
        for key in given:
            if key not in self._parameter_names or (inside and key == inside):
                name = f" '{key}'" if is_word(key) else ""
                place = f" in '{inside}'" if inside else ""
                raise MalformedRequest(
                    f"{where}unknown key{name}{place}; known keys: {self._known}"
                )


def _scalar(value: object) -> object:
    """A form field's text as the JSON scalar it spells, else the text itself."""
    return spelled(value.strip() if isinstance(value, str) else value)


def _base64(value: object, where: str) -> str:
    """The text in KServe's `{"b64": ...}`; raises RequestError."""
    if not isinstance(value, str):
        raise UnusableRequest(f"{where}'b64' must be a string")
    try:
        return utf8(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError):
        raise MalformedRequest(f"{where}'b64' is not valid base64") from None
