"""CamemBERT."""

from __future__ import annotations

from ft_handler.architectures.roberta import Roberta


class Camembert(Roberta):
    """RoBERTa with another vocabulary."""

    model_type = "camembert"
    title = "CamemBERT"


ARCHITECTURE = Camembert()
