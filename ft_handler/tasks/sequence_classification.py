"""One text or a pair, scored against labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ft_handler.tasks.marks import mark_truncated
from ft_handler.tasks.scores import Floats, sigmoid, softmax
from ft_handler.types import (
    ClassificationParams,
    Encoding,
    ModelInput,
    Prediction,
)


def default_function(problem_type: str | None, num_labels: int) -> str:
    """As transformers: regression none, multi-label or one label sigmoid, else softmax."""
    if problem_type == "regression":
        return "none"
    if problem_type == "multi_label_classification" or num_labels == 1:
        return "sigmoid"
    return "softmax"


class Classification:
    """Logits `[inputs, num_labels]` to labels and scores."""

    def __init__(self, labels: Mapping[int, str], problem_type: str | None) -> None:
        self._labels = [labels[i] for i in range(len(labels))]
        self._function = default_function(problem_type, len(labels))

    def predict(
        self,
        inputs: Sequence[ModelInput],
        encodings: Sequence[Encoding],
        logits: Floats,
    ) -> list[Prediction]:
        """One answer an input: `{"label", "score"}`, or a list sorted by score with `top_k`."""
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(inputs):
            groups.setdefault(item.params, []).append(i)
        if len(groups) == 1:
            predictions = self._group(next(iter(groups)), logits)
        else:
            predictions = [{}] * len(inputs)
            for params, members in groups.items():
                for i, prediction in zip(
                    members, self._group(params, logits[members]), strict=True
                ):
                    predictions[i] = prediction
        for prediction, encoding in zip(predictions, encodings, strict=True):
            if encoding.truncated:
                mark_truncated(prediction)
        return predictions

    def _group(self, params: ClassificationParams, logits: Floats) -> list[Prediction]:
        function = params.function or self._function
        labels = self._labels
        if params.top_k is None:
            best = logits.argmax(axis=1)  # every function keeps the order
            scores = _apply(function, logits)[np.arange(len(logits)), best]
            return [
                {"label": labels[i], "score": score}
                for i, score in zip(best.tolist(), scores.tolist(), strict=True)
            ]
        order = np.argsort(-logits, axis=1, kind="stable")[:, : params.top_k or None]
        scores = np.take_along_axis(_apply(function, logits), order, axis=1)
        return [
            [{"label": labels[i], "score": s} for i, s in zip(row, row_scores, strict=True)]
            for row, row_scores in zip(order.tolist(), scores.tolist(), strict=True)
        ]


def _apply(function: str, logits: Floats) -> Floats:
    if function == "softmax":
        return softmax(logits)
    return sigmoid(logits) if function == "sigmoid" else logits
