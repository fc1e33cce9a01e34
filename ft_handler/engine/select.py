"""The engine for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ft_handler.engine.base import Engine
from ft_handler.engine.cpu import CpuEngine
from ft_handler.engine.cuda import CudaEngine

if TYPE_CHECKING:
    from ft_handler.model.bundle import LoadedModel


def engine_for(
    model: LoadedModel,
    device: torch.device,
    *,
    max_tokens: int = 16384,
    max_sequences: int = 64,
    graph_memory: int = 1 << 30,
) -> Engine:
    """The engine for a device: graphs on a GPU, plain calls on a CPU."""
    if device.type == "cuda":
        return CudaEngine(
            model,
            device,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            graph_memory=graph_memory,
        )
    return CpuEngine(model)
