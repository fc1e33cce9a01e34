"""What one batch was and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

STAGES = ("decode", "tokenize", "pack", "compute", "postprocess", "encode")


@dataclass(slots=True)
class BatchStats:
    """Figures of one batch of requests.

    undecodable   bodies that are not what the client said they are
    padded        tokens that padding every sequence to the longest one would have added
    padded_fixed  the same for padding to the longest allowed length
    seconds       the host's wall time in each of `STAGES`; "compute" is launching and waiting for
                  the engine, so a device's work that other stages hide is not in it
    """

    requests: int = 0
    sequences: int = 0
    tokens: int = 0
    padded: int = 0
    padded_fixed: int = 0
    buckets: int = 0
    refused: int = 0
    failed: int = 0
    undecodable: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, other: BatchStats) -> None:
        """Count the figures of another part of the batch as well."""
        for one in fields(self):
            if one.name != "seconds":
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds


class Stopwatch:
    """Adds the time between its calls to stages."""

    def __init__(self, clock: Callable[[], float], seconds: dict[str, float]) -> None:
        self._clock, self._seconds = clock, seconds
        self._last = clock()

    def lap(self, stage: str) -> None:
        """The time since the last call was spent in `stage`."""
        now = self._clock()
        self._seconds[stage] += now - self._last
        self._last = now
