"""Marks of predictions."""

from __future__ import annotations

from ft_handler.types import (
    Prediction,
)


def mark_truncated(prediction: Prediction) -> None:
    for answer in prediction if isinstance(prediction, list) else [prediction]:
        answer["truncated"] = True
