"""DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ft_handler.architectures.base import CLASSIFIERS, Architecture, summary_head, weight_and_bias
from ft_handler.model.heads import ReluPooledHead
from ft_handler.model.spec import EncoderSpec
from ft_handler.tasks.base import Head

_EMBEDDINGS = "{base}.embeddings."
_LAYER = "{base}.transformer.layer.{layer}."


class DistilBert(Architecture):
    """Half of BERT's layers under other names; no token types, ReLU before the classifier."""

    model_type = "distilbert"
    title = "DistilBERT"
    base = "distilbert"
    table: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "embeddings.word": (_EMBEDDINGS + "word_embeddings.weight",),
        "embeddings.position": (_EMBEDDINGS + "position_embeddings.weight",),
        **weight_and_bias(
            {
                "embeddings.norm": (_EMBEDDINGS + "LayerNorm",),
                "layers.qkv": (
                    _LAYER + "attention.q_lin",
                    _LAYER + "attention.k_lin",
                    _LAYER + "attention.v_lin",
                ),
                "layers.out": (_LAYER + "attention.out_lin",),
                "layers.norm1": (_LAYER + "sa_layer_norm",),
                "layers.up": (_LAYER + "ffn.lin1",),
                "layers.down": (_LAYER + "ffn.lin2",),
                "layers.norm2": (_LAYER + "output_layer_norm",),
            }
        ),
    }
    ignored = r"vocab_(transform|layer_norm|projector)\..*|({base}\.)?embeddings\.position_ids"
    activation = "activation"
    heads: ClassVar[Mapping[str, Head]] = {
        CLASSIFIERS: summary_head(ReluPooledHead, "pre_classifier", "classifier")
    }

    def spec(self, config: Any) -> EncoderSpec:
        """Sizes under DistilBERT's own names; its norms' epsilon stands in no configuration."""
        return EncoderSpec(
            hidden_size=config.dim,
            embedding_size=config.dim,
            num_layers=config.n_layers,
            num_heads=config.n_heads,
            intermediate_size=config.hidden_dim,
            activation=self.fused_activation(config),
            layer_norm_eps=1e-12,
        )

    def token_types(self, config: Any) -> int:
        """None, even where a configuration has BERT's field."""
        return 0


ARCHITECTURE = DistilBert()
