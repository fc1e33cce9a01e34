"""Reads Kubernetes objects of KServe by KServe's own types: prints what does not fit, as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import kserve.models
import kubernetes.client

PLAIN = {"str": str, "int": int, "bool": bool, "float": float, "datetime": str}


def wrong(value: Any, kind: str, where: str) -> Iterator[str]:
    """What of a value is not as its type has it."""
    listed = re.fullmatch(r"[Ll]ist\[(.+)\]", kind)
    mapped = re.fullmatch(r"[Dd]ict[(\[]str, (.+)[)\]]", kind)
    if kind == "object":
        return
    if listed or mapped:
        if not isinstance(value, list if listed else dict):
            yield f"{where} is no {kind}"
            return
        items = enumerate(value) if listed else value.items()
        for key, item in items:
            yield from wrong(item, (listed or mapped)[1], f"{where}.{key}")  # type: ignore[index]
    elif kind in PLAIN:
        if type(value) is not PLAIN[kind]:
            yield f"{where} is no {kind}"
    else:
        yield from wrong_object(value, kind, where)


def wrong_object(value: Any, kind: str, where: str) -> Iterator[str]:
    """The same of an object with fields."""
    made = getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind)
    if not isinstance(value, dict):
        yield f"{where} is no {kind}"
        return
    names = {outer: name for name, outer in made.attribute_map.items()}
    given = {}
    for key, item in value.items():
        if key not in names:
            yield f"{where} has no {key}"
            continue
        given[names[key]] = item
        inner = made.openapi_types[names[key]]
        yield from wrong(item, inner, f"{where}.{key}")
    try:
        made(**given)
    except ValueError as error:  # a field that has to be there
        yield f"{where}: {error}"


KINDS = {"ServingRuntime": "V1alpha1ServingRuntime", "InferenceService": "V1beta1InferenceService"}
documents = json.load(sys.stdin)
print(json.dumps([list(wrong(d, KINDS[d["kind"]], d["metadata"]["name"])) for d in documents]))
