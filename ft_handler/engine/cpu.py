"""Runs packed batches on the host, where they stand."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ft_handler.engine.base import Done, Pending, synthetic_batch
from ft_handler.types import Floats, PackedBatch

if TYPE_CHECKING:
    from ft_handler.model.bundle import LoadedModel


class CpuEngine:
    """Runs a model on the host; threads obey `torch.set_num_threads`. Safe from several threads."""

    overlaps = False

    def __init__(self, model: LoadedModel) -> None:
        self._module, self._vocab_size = model.fused, model.info.vocab_size

    def launch(self, batch: PackedBatch) -> Pending:
        """Compute the batch now."""
        with torch.inference_mode():
            out = self._module.packed(
                torch.from_numpy(batch.input_ids),
                torch.from_numpy(batch.token_type_ids),
                torch.from_numpy(batch.cu_seqlens),
                batch.max_seqlen,
            )
        outputs: Floats = out.numpy()
        return Done(outputs)

    def warm_up(self) -> dict[str, float]:
        """Pack the weights and run a few batches; TorchScript optimises in its first calls."""
        start = time.perf_counter()
        self._module.release()
        for lengths in ([1], [7, 3], [16, 16, 5]):
            self.launch(synthetic_batch(lengths, self._vocab_size)).result()
        return {"seconds": time.perf_counter() - start}
