"""What the `handler:` section may say to TorchServe's front."""

from __future__ import annotations

from ft_handler.config import Flag, Settings, setting


class TorchServeSettings(Settings):
    """Settings of the worker around the model."""

    metrics: Flag = setting(
        True,
        "Emit the metrics of docs/metrics.md to TorchServe.",
    )
    fast_receive: Flag = setting(
        True,
        "Read requests from TorchServe through a buffer; only with the TorchServe version it was "
        "tested with, otherwise the stock reader stays.",
    )
