"""Refuses TorchServe's request envelopes, which make every answer of this handler a 503.

An envelope (`service_envelope`, or TS_SERVICE_ENVELOPE as KServe's template sets it) rewrites a
batch before the handler sees it: it flattens lists, so that answers no longer match requests, or
reads the first request alone. This handler reads those bodies itself.
"""

from __future__ import annotations

import sys

from ft_handler.errors import ConfigError


def refuse(envelope: str | None) -> None:
    """Raise ConfigError for any envelope; None and the empty name are none."""
    if envelope:
        raise ConfigError(
            f"service_envelope (or TS_SERVICE_ENVELOPE) is {envelope!r}, and with an envelope "
            "TorchServe answers every request of this handler 503; leave it out: KServe v1, Open "
            "Inference v2 and plain bodies are read without one"
        )


def of_this_load() -> str | None:
    """The envelope of the model that TorchServe is loading now, None without one.

    TorchServe tells the handler nothing of it; its loader, which has called the handler, knows it.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "load" and frame.f_globals["__name__"] == "ts.model_loader":
            found = frame.f_locals.get("envelope")
            return None if found is None else str(found)
    return None
