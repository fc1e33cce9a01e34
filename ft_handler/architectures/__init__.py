"""The architectures there are, one file each.

A new one is its file and a line in `_HOMES`; `register` makes one known that lives elsewhere.
"""

from __future__ import annotations

import importlib

from ft_handler.architectures.base import Architecture
from ft_handler.errors import ModelError

#: transformers' `model_type` -> the module whose `ARCHITECTURE` serves it.
_HOMES = {"bert": "ft_handler.architectures.bert"}

_registered: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make an architecture known; one of the same model type is replaced."""
    _registered[architecture.model_type] = architecture


def unregister(model_type: str) -> None:
    """Forget an architecture that was registered."""
    _registered.pop(model_type, None)


def names() -> tuple[str, ...]:
    """The model types served, in order."""
    return tuple(sorted({*_HOMES, *_registered}))


def get(model_type: str) -> Architecture:
    """The architecture of transformers' `model_type`; raises ModelError naming those served."""
    if model_type in _registered:
        return _registered[model_type]
    if model_type not in _HOMES:
        raise ModelError(f"architecture {model_type!r} is not served; served: {', '.join(names())}")
    found = importlib.import_module(_HOMES[model_type]).ARCHITECTURE
    assert isinstance(found, Architecture)
    return found
