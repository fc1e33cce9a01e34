"""XLM-RoBERTa."""

from __future__ import annotations

from ft_handler.architectures.roberta import Roberta


class XlmRoberta(Roberta):
    """RoBERTa with another vocabulary."""

    model_type = "xlm-roberta"
    title = "XLM-RoBERTa"


ARCHITECTURE = XlmRoberta()
