"""BERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ft_handler.architectures.base import Architecture, weight_and_bias

_EMBEDDINGS = "{base}.embeddings."
_LAYER = "{base}.encoder.layer.{layer}."


class Bert(Architecture):
    """BERT, of any size and vocabulary."""

    model_type = "bert"
    title = "BERT"
    base = "bert"
    table: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "embeddings.word": (_EMBEDDINGS + "word_embeddings.weight",),
        "embeddings.position": (_EMBEDDINGS + "position_embeddings.weight",),
        "embeddings.token_type": (_EMBEDDINGS + "token_type_embeddings.weight",),
        **weight_and_bias(
            {
                "embeddings.norm": (_EMBEDDINGS + "LayerNorm",),
                "layers.qkv": (
                    _LAYER + "attention.self.query",
                    _LAYER + "attention.self.key",
                    _LAYER + "attention.self.value",
                ),
                "layers.out": (_LAYER + "attention.output.dense",),
                "layers.norm1": (_LAYER + "attention.output.LayerNorm",),
                "layers.up": (_LAYER + "intermediate.dense",),
                "layers.down": (_LAYER + "output.dense",),
                "layers.norm2": (_LAYER + "output.LayerNorm",),
            }
        ),
    }
    # Pretraining heads, and the pooler, which not every head reads.
    ignored = r"cls\..*|({base}\.)?embeddings\.position_ids|({base}\.)?pooler\..*"


ARCHITECTURE = Bert()
