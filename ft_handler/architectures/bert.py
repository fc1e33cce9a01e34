"""BERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ft_handler.architectures.base import Architecture

_EMBEDDINGS = "{base}.embeddings."
_LAYER = "{base}.encoder.layer.{layer}."


class Bert(Architecture):
    """BERT, of any size and vocabulary."""

    model_type = "bert"
    base = "bert"
    table: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "embeddings.word": (_EMBEDDINGS + "word_embeddings.weight",),
        "embeddings.position": (_EMBEDDINGS + "position_embeddings.weight",),
        "embeddings.token_type": (_EMBEDDINGS + "token_type_embeddings.weight",),
        "embeddings.norm.weight": (_EMBEDDINGS + "LayerNorm.weight",),
        "embeddings.norm.bias": (_EMBEDDINGS + "LayerNorm.bias",),
        "layers.qkv.weight": (
            _LAYER + "attention.self.query.weight",
            _LAYER + "attention.self.key.weight",
            _LAYER + "attention.self.value.weight",
        ),
        "layers.qkv.bias": (
            _LAYER + "attention.self.query.bias",
            _LAYER + "attention.self.key.bias",
            _LAYER + "attention.self.value.bias",
        ),
        "layers.out.weight": (_LAYER + "attention.output.dense.weight",),
        "layers.out.bias": (_LAYER + "attention.output.dense.bias",),
        "layers.norm1.weight": (_LAYER + "attention.output.LayerNorm.weight",),
        "layers.norm1.bias": (_LAYER + "attention.output.LayerNorm.bias",),
        "layers.up.weight": (_LAYER + "intermediate.dense.weight",),
        "layers.up.bias": (_LAYER + "intermediate.dense.bias",),
        "layers.down.weight": (_LAYER + "output.dense.weight",),
        "layers.down.bias": (_LAYER + "output.dense.bias",),
        "layers.norm2.weight": (_LAYER + "output.LayerNorm.weight",),
        "layers.norm2.bias": (_LAYER + "output.LayerNorm.bias",),
    }
    # Pretraining heads, and the pooler, which not every head reads.
    ignored = r"cls\..*|({base}\.)?embeddings\.position_ids|({base}\.)?pooler\..*"


ARCHITECTURE = Bert()
