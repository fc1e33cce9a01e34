"""Padding-free serving of BERT and its kin: traced models, length buckets, a TorchServe handler.

Importing this package is cheap: torch and the rest load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ft_handler.version import __version__

if TYPE_CHECKING:
    from ft_handler.errors import FtHandlerError
    from ft_handler.model.bundle import LoadedModel, load_model
    from ft_handler.model.info import ModelInfo
    from ft_handler.native.library import build_info, load_library
    from ft_handler.predictor import Predictor
    from ft_handler.prepare.options import TraceOptions

_HOMES = {
    "FtHandlerError": "errors",
    "LoadedModel": "model.bundle",
    "ModelInfo": "model.info",
    "Predictor": "predictor",
    "TraceOptions": "prepare.options",
    "build_info": "native.library",
    "load_library": "native.library",
    "load_model": "model.bundle",
}

__all__ = [
    "FtHandlerError",
    "LoadedModel",
    "ModelInfo",
    "Predictor",
    "TraceOptions",
    "__version__",
    "build_info",
    "load_library",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
