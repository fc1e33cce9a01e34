"""ELECTRA's discriminator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ft_handler.architectures.base import CLASSIFIERS, summary_head, weight_and_bias
from ft_handler.architectures.bert import Bert
from ft_handler.model.heads import GeluPooledHead
from ft_handler.model.spec import EncoderSpec
from ft_handler.tasks.base import Head


class Electra(Bert):
    """BERT's layers; small ones behind a projection of narrower embeddings, GELU in the head."""

    model_type = "electra"
    title = "ELECTRA"
    base = "electra"
    ignored = rf"{Bert.ignored}|(discriminator|generator)_(predictions|lm_head)\..*"
    heads: ClassVar[Mapping[str, Head]] = {CLASSIFIERS: summary_head(GeluPooledHead)}

    def spec(self, config: Any) -> EncoderSpec:
        """BERT's, with a width of the embeddings."""
        return dataclasses.replace(super().spec(config), embedding_size=config.embedding_size)

    def names(self, config: Any) -> Mapping[str, tuple[str, ...]]:
        """With the projection, where embeddings have a width of their own."""
        if config.embedding_size == config.hidden_size:
            return self.table
        projection = {"embeddings.projection": ("{base}.embeddings_project",)}
        return {**self.table, **weight_and_bias(projection)}


ARCHITECTURE = Electra()
