"""RoBERTa, and what else is built like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ft_handler.architectures.base import CLASSIFIERS, summary_head
from ft_handler.architectures.bert import Bert
from ft_handler.errors import ModelError
from ft_handler.model.heads import PooledHead
from ft_handler.tasks.base import Head


class Roberta(Bert):
    """BERT's layers; positions count from behind the pad's number, a classifier without a pooler.

    BERTweet is of this model type too.
    """

    model_type = "roberta"
    title = "RoBERTa"
    base = "roberta"
    ignored = rf"{Bert.ignored}|lm_head\..*"
    heads: ClassVar[Mapping[str, Head]] = {CLASSIFIERS: summary_head(PooledHead)}

    def first_position(self, config: Any) -> int:
        """Behind the pad's number."""
        pad = self.pad(config)
        if pad is None:
            raise ModelError("pad_token_id=None is not served: positions count from behind it")
        return pad + 1


ARCHITECTURE = Roberta()
