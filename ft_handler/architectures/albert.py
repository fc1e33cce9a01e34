"""ALBERT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ft_handler.architectures.base import CLASSIFIERS, Architecture, summary_head, weight_and_bias
from ft_handler.model.heads import PooledHead
from ft_handler.model.spec import EncoderSpec
from ft_handler.tasks.base import Head

_EMBEDDINGS = "{base}.embeddings."
# Names without a layer's number: all layers share what they have.
_LAYER = "{base}.encoder.albert_layer_groups.0.albert_layers.0."


class Albert(Architecture):
    """One layer's weights for all layers, behind a projection of narrow embeddings."""

    model_type = "albert"
    title = "ALBERT"
    base = "albert"
    table: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "embeddings.word": (_EMBEDDINGS + "word_embeddings.weight",),
        "embeddings.position": (_EMBEDDINGS + "position_embeddings.weight",),
        "embeddings.token_type": (_EMBEDDINGS + "token_type_embeddings.weight",),
        **weight_and_bias(
            {
                "embeddings.norm": (_EMBEDDINGS + "LayerNorm",),
                "embeddings.projection": ("{base}.encoder.embedding_hidden_mapping_in",),
                "layers.qkv": (
                    _LAYER + "attention.query",
                    _LAYER + "attention.key",
                    _LAYER + "attention.value",
                ),
                "layers.out": (_LAYER + "attention.dense",),
                "layers.norm1": (_LAYER + "attention.LayerNorm",),
                "layers.up": (_LAYER + "ffn",),
                "layers.down": (_LAYER + "ffn_output",),
                "layers.norm2": (_LAYER + "full_layer_layer_norm",),
            }
        ),
    }
    ignored = (
        r"(predictions|sop_classifier)\..*"
        r"|({base}\.)?embeddings\.position_ids|({base}\.)?pooler\..*"
    )
    accepted: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **Architecture.accepted,
        "num_hidden_groups": (1,),
        "inner_group_num": (1,),
    }
    heads: ClassVar[Mapping[str, Head]] = {
        CLASSIFIERS: summary_head(PooledHead, "{base}.pooler", "classifier")
    }

    def spec(self, config: Any) -> EncoderSpec:
        """BERT's, with a width of the embeddings."""
        return dataclasses.replace(super().spec(config), embedding_size=config.embedding_size)


ARCHITECTURE = Albert()
