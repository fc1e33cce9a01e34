"""What an encoder is: sizes and choices that no tensor's shape has to tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder's sizes and choices; an architecture makes one of a checkpoint's configuration.

    embedding_size  width of the embedding tables; where it differs from `hidden_size` a projection
                    follows their layer norm
    activation      of the feed-forward block: "gelu" (erf), "gelu_tanh", "relu" or "silu"
    relative_distance  D of a bias by head and distance, which every layer adds to its scaled scores
                    and which is the same for all distances from D on; 0: there is none
    """

    hidden_size: int
    embedding_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    layer_norm_eps: float
    relative_distance: int = 0

    @property
    def op_interface(self) -> int:
        """The least interface of the library's ops that runs it."""
        return 3 if self.relative_distance or self.activation not in ("", "gelu") else 2

    def text(self, names: Iterable[str]) -> str:
        """The specification as the op `encode` reads it, with its weights' names in order."""
        return (
            f"hidden={self.hidden_size} embedding={self.embedding_size} layers={self.num_layers} "
            f"heads={self.num_heads} intermediate={self.intermediate_size} "
            f"activation={self.activation} eps={self.layer_norm_eps!r} weights={','.join(names)}"
        )
