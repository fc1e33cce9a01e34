"""The function TorchServe calls: initialise once, then answer batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ft_handler.servers.torchserve.busy import Mark
from ft_handler.servers.torchserve.handler import Worker, load

_workers: list[tuple[Worker, Mark]] = []


def handle(data: Sequence[Mapping[str, object]] | None, ctx: Any) -> list[bytes] | None:
    """Initialise on the first call (`data` is None), then answer a batch a call."""
    if data is None:
        _workers[:] = [(load(ctx), Mark())]
        return None
    worker, mark = _workers[0]
    mark.step()
    try:
        return worker.handle(data, ctx)
    finally:
        mark.step()
