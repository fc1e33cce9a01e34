"""Padding-free BERT serving: traced EFFT models, length buckets, a TorchServe handler.

Importing this package is cheap: torch and the rest load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ft_handler.version import __version__

if TYPE_CHECKING:
    from ft_handler._lib import build_info, load_library
    from ft_handler.errors import FtHandlerError
    from ft_handler.model import LoadedModel, ModelInfo, load_model
    from ft_handler.trace import TraceOptions

_HOMES = {
    "FtHandlerError": "errors",
    "LoadedModel": "model",
    "ModelInfo": "model",
    "TraceOptions": "trace",
    "build_info": "_lib",
    "load_library": "_lib",
    "load_model": "model",
}

__all__ = [
    "FtHandlerError",
    "LoadedModel",
    "ModelInfo",
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
