"""Logits to scores."""

from __future__ import annotations

import numpy as np

from ft_handler.types import Floats


def softmax(logits: Floats, axis: int = -1) -> Floats:
    """exp(x - max) / sum over the axis of the labels."""
    shifted: Floats = np.exp(logits - logits.max(axis=axis, keepdims=True))
    shifted /= shifted.sum(axis=axis, keepdims=True)
    return shifted


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow on either side."""
    small: Floats = np.exp(-np.abs(logits))
    scores: Floats = np.where(logits >= 0, np.float32(1), small)
    scores /= 1 + small
    return scores
