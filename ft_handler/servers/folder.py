"""What a model's folder says to whichever server it is given to, in TorchServe's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ft_handler.errors import ConfigError

#: Seconds that a server waits for an answer where the folder does not say; TorchServe's own.
RESPONSE_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests become batches, where nothing else says so.

    size   most requests of a batch
    delay  seconds to wait for more
    """

    size: int = 32
    delay: float = 0.005


def batching(model_yaml: Mapping[str, object]) -> Batching:
    """`batchSize` and `maxBatchDelay` of model-config.yaml; raises ConfigError."""
    size, delay = model_yaml.get("batchSize", 32), model_yaml.get("maxBatchDelay", 5)
    if type(size) is not int or size < 1:
        raise ConfigError("'batchSize' in model-config.yaml must be a whole number from 1 on")
    if not isinstance(delay, (int, float)) or delay < 0:
        raise ConfigError("'maxBatchDelay' in model-config.yaml must be milliseconds from 0 on")
    return Batching(size, delay / 1000)


def response_timeout(model_yaml: Mapping[str, object] | None) -> float:
    """Seconds after which a server gives a worker up: the folder's, else `RESPONSE_TIMEOUT`."""
    seconds = (model_yaml or {}).get("responseTimeout")
    if isinstance(seconds, (int, float)) and seconds > 0:
        return float(seconds)
    return RESPONSE_TIMEOUT
