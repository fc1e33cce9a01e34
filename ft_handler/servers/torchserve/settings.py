"""What the `handler:` section may say to TorchServe's front."""

from __future__ import annotations

from ft_handler.config import Flag, Settings, Whole, environment, setting

#: What `ft-handler serve` tells its workers, which TorchServe does not: its `max_response_size`.
RESPONSE_VARIABLE = "FT_HANDLER_MAX_RESPONSE_SIZE"
#: TorchServe's own.
RESPONSE_SIZE = 6_553_500


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
    max_response_size: Whole | None = setting(
        None,
        "Most bytes of one answer; more answers 413. TorchServe ends a worker that answers more "
        "than `max_response_size` in config.properties, so this may not be more than that. Null is "
        "that where `ft-handler serve` started the server, else TorchServe's default, 6553500.",
        1,
    )

    def most_bytes(self) -> int:
        """Of one answer that TorchServe takes."""
        told = environment(RESPONSE_VARIABLE)
        return self.max_response_size or (RESPONSE_SIZE if told is None else int(told))
