"""What an encoder is: sizes and choices that no tensor's shape has to tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder's sizes and choices; an architecture makes one of a checkpoint's configuration.

    embedding_size  width of the embedding tables; where it differs from `hidden_size` a projection
                    follows their layer norm
    activation      of the feed-forward block, such as "gelu" (erf)
    """

    hidden_size: int
    embedding_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    layer_norm_eps: float

    def text(self, names: Iterable[str]) -> str:
        """The specification as the op `encode` reads it, with its weights' names in order."""
        return (
            f"hidden={self.hidden_size} embedding={self.embedding_size} layers={self.num_layers} "
            f"heads={self.num_heads} intermediate={self.intermediate_size} "
            f"activation={self.activation} eps={self.layer_norm_eps!r} weights={','.join(names)}"
        )
