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
    delay = model_yaml.get("maxBatchDelay", 5)
    if isinstance(delay, bool) or not isinstance(delay, (int, float)) or delay < 0:
        raise ConfigError("'maxBatchDelay' in model-config.yaml must be milliseconds from 0 on")
    return Batching(_count(model_yaml, "batchSize", 32), delay / 1000)


def most_waiting(model_yaml: Mapping[str, object]) -> int:
    """`jobQueueSize` of model-config.yaml: how many requests may wait; raises ConfigError."""
    return _count(model_yaml, "jobQueueSize", 1000)


def _count(model_yaml: Mapping[str, object], name: str, default: int) -> int:
    value = model_yaml.get(name, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"'{name}' in model-config.yaml must be a whole number from 1 on")
    return value


def response_timeout(model_yaml: Mapping[str, object] | None) -> float:
    """Seconds after which a server gives a worker up: the folder's, else `RESPONSE_TIMEOUT`."""
    seconds = (model_yaml or {}).get("responseTimeout")
    if isinstance(seconds, (int, float)) and seconds > 0:
        return float(seconds)
    return RESPONSE_TIMEOUT
