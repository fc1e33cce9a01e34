"""The types that travel between stages: one type an arrow.

bytes -decode-> Request -tokenize-> Encoding -bucket-> [Encoding] -pack-> PackedBatch
 -encoder and head-> logits -postprocess-> Prediction -encode-> response
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences laid end to end, without a pad: what the encoder eats.

    input_ids       [total] int64
    token_type_ids  [total] int64
    cu_seqlens      [batch + 1] int32, cu_seqlens[0] == 0, cu_seqlens[-1] == total
    max_seqlen      the longest length, counted on the host
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.cu_seqlens) - 1

    @property
    def total(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)
