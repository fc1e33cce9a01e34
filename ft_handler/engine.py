"""Runs packed batches through a loaded model: logits out, in fp32, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ft_handler.types import PackedBatch

if TYPE_CHECKING:
    from ft_handler.model import LoadedModel

Logits = tuple[NDArray[np.float32], ...]


class Pending(Protocol):
    """A batch under way."""

    def result(self) -> Logits:
        """Wait for the logits: `([batch, num_labels],)`, or `([total], [total])` for QA."""


class Engine(Protocol):
    """What the pipeline asks of a device."""

    def launch(self, batch: PackedBatch) -> Pending:
        """Start a batch; on a GPU this returns before the kernels end."""


class _Done:
    """A batch that was computed when it was launched."""

    def __init__(self, logits: Logits) -> None:
        self._logits = logits

    def result(self) -> Logits:
        return self._logits


class CpuEngine:
    """Runs `module.packed` on the host; threads obey `torch.set_num_threads`."""

    def __init__(self, model: LoadedModel) -> None:
        self._module = model.module

    def launch(self, batch: PackedBatch) -> Pending:
        """Compute the batch now: `[batch, num_labels]`, or twice `[total]` for QA."""
        with torch.inference_mode():
            out = self._module.packed(
                torch.from_numpy(batch.input_ids),
                torch.from_numpy(batch.token_type_ids),
                torch.from_numpy(batch.cu_seqlens),
                batch.max_seqlen,
            )
        return _Done(tuple(o.numpy() for o in out))
