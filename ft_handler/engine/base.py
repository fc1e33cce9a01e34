"""What the pipeline asks of a device: packed batches in, fp32 outputs on the host out."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ft_handler.types import Floats, PackedBatch


class Pending(Protocol):
    """A batch under way."""

    def result(self) -> Floats:
        """Wait for the outputs: `[batch, columns]`, or `[columns, total]` if they are for tokens.

        Raises OutOfDeviceMemory when the batch has to be split, EngineLost when the process
        cannot use its GPU any more.
        """


class Engine(Protocol):
    """What the pipeline asks of a device."""

    @property
    def overlaps(self) -> bool:
        """Whether `launch` returns before the batch is computed."""

    def launch(self, batch: PackedBatch) -> Pending:
        """Start a batch; on a GPU this returns before the kernels end."""

    def warm_up(self) -> dict[str, float]:
        """Run once before the first request; returns what it took, for the log."""


class Done:
    """A batch that was computed when it was launched."""

    def __init__(self, outputs: Floats) -> None:
        self._outputs = outputs

    def result(self) -> Floats:
        return self._outputs


def synthetic_batch(lengths: list[int], vocab_size: int) -> PackedBatch:
    """A batch of the given lengths with valid ids, for warm-up and tests."""
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    total = int(cu_seqlens[-1])
    ids = np.arange(total, dtype=np.int64) % vocab_size
    return PackedBatch(ids, np.zeros(total, np.int64), cu_seqlens, max(lengths, default=0))
