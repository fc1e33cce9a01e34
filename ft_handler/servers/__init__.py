"""The servers that can stand in front of a model: a folder each."""

from __future__ import annotations

from ft_handler.config import Settings
from ft_handler.servers.torchserve.settings import TorchServeSettings


def server_settings() -> tuple[type[Settings], ...]:
    """The settings that servers own: other fronts know the names and leave them alone."""
    return (TorchServeSettings,)
