"""The function TorchServe calls: `--handler ft_handler.entry:handle`, or a file that imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ft_handler.servers.torchserve.handler import FtHandler

_handler = FtHandler()


def handle(data: Sequence[Mapping[str, Any]] | None, ctx: Any) -> list[bytes] | None:
    """Initialise on the first call (`data` is None), then answer a batch a call."""
    if data is None:
        _handler.initialize(ctx)
        return None
    return _handler.handle(data, ctx)
