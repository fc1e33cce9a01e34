"""What one batch was and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

STAGES = ("decode", "tokenize", "pack", "compute", "postprocess", "encode")


@dataclass(slots=True)
class BatchStats:
    """Figures of one batch of requests.

    undecodable   bodies that are not what the client said they are
    errors        how many requests were answered with each type of error
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
    errors: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, other: BatchStats) -> None:
        """Count the figures of another part of the batch as well."""
        for one in fields(self):
            if one.name not in ("errors", "seconds"):
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.errors.update(other.errors)
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds


class Lap(NamedTuple):
    """A stretch of one stage, in seconds of the stopwatch's clock."""

    stage: str
    begin: float
    end: float


class Stopwatch:
    """Adds the time between its calls to stages.

    laps  where each stretch is written down as well
    """

    def __init__(
        self, clock: Callable[[], float], seconds: dict[str, float], laps: list[Lap] | None = None
    ) -> None:
        self._clock, self._seconds, self._laps = clock, seconds, laps
        self._last = clock()

    def lap(self, stage: str) -> None:
        """The time since the last call was spent in `stage`."""
        now = self._clock()
        self._seconds[stage] += now - self._last
        if self._laps is not None:
            self._laps.append(Lap(stage, self._last, now))
        self._last = now
