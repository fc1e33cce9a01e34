"""Head output to Prediction: one class a task, vectorised over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ft_handler.types import (
    ClassificationParams,
    Encoding,
    ModelInput,
    Prediction,
    QuestionParams,
    QuestionWindows,
)

Floats = NDArray[np.float32]


def softmax(logits: Floats) -> Floats:
    """exp(x - max) / sum over the last axis; logits [..., labels]."""
    shifted: Floats = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow on either side."""
    small: Floats = np.exp(-np.abs(logits))
    scores: Floats = np.where(logits >= 0, np.float32(1), small)
    scores /= 1 + small
    return scores


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
                _mark_truncated(prediction)
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


def _mark_truncated(prediction: Prediction) -> None:
    for answer in prediction if isinstance(prediction, list) else [prediction]:
        answer["truncated"] = True


#: Of a single answer: twelve spans left out change its score by 1e-5 of it at most.
_LEAST_SHARE = 1e-6


class QuestionAnswering:
    """Start and end logits of every window to answers, as transformers 4.57's pipeline has them.

    Per window: softmax of the start and of the end logits over `[CLS]` and the context's tokens;
    a span's score is the product, for spans of at most `max_answer_len` tokens. The best spans of
    all windows become text; spans with the same text (case aside) are one answer, their scores
    added. The null score is start * end at `[CLS]`, the least over the windows.
    """

    def predict(
        self,
        inputs: Sequence[ModelInput],
        encodings: Sequence[Encoding],
        start: Floats,
        end: Floats,
    ) -> list[Prediction]:
        """One answer an input, or a list with `top_k` of 2 and more.

        start, end  [total] logits of all windows end to end, in the order of `encodings`
        """
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(inputs):
            groups.setdefault(item.params, []).append(i)
        offsets = np.cumsum([0] + [sum(map(len, e.sequences)) for e in encodings])
        predictions: list[Prediction] = [{}] * len(inputs)
        for params, members in groups.items():
            self._group(params, members, encodings, offsets, start, end, predictions)
        return predictions

    def _group(
        self,
        params: QuestionParams,
        members: Sequence[int],
        encodings: Sequence[Encoding],
        offsets: NDArray[np.int64],
        start: Floats,
        end: Floats,
        predictions: list[Prediction],
    ) -> None:
        cls: list[int] = []
        begins: list[int] = []
        counts: list[int] = []
        for i in members:
            encoding = encodings[i]
            windows = _windows_of(encoding)
            at = int(offsets[i])
            for sequence, (begin, stop) in zip(encoding.sequences, windows.spans, strict=True):
                cls.append(at)
                begins.append(at + windows.first)
                counts.append(stop - begin)
                at += len(sequence)
        wanted = 2 * params.top_k + 10 if params.align_to_words else params.top_k
        null, scores, firsts, lasts = best_spans(
            start,
            end,
            np.array(cls),
            np.array(begins),
            np.array(counts),
            params.max_answer_len,
            wanted,
        )
        window = 0
        for i in members:
            encoding = encodings[i]
            windows = _windows_of(encoding)
            until = window + len(windows.spans)
            answers = _answers(
                windows,
                params.align_to_words,
                _LEAST_SHARE if params.top_k == 1 else 0.0,
                scores[window:until],
                firsts[window:until],
                lasts[window:until],
            )
            if params.handle_impossible_answer:
                least = float(null[window:until].min())
                answers.append({"score": least, "start": 0, "end": 0, "answer": ""})
            answers.sort(key=lambda answer: answer["score"], reverse=True)
            predictions[i] = answers[0] if params.top_k == 1 else answers[: params.top_k]
            if encoding.truncated:
                _mark_truncated(predictions[i])
            window = until


def _windows_of(encoding: Encoding) -> QuestionWindows:
    assert encoding.windows is not None
    return encoding.windows


def best_spans(
    start: Floats,
    end: Floats,
    cls: NDArray[np.int64],
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
    max_answer_len: int,
    wanted: int,
) -> tuple[Floats, list[list[float]], list[list[int]], list[list[int]]]:
    """The best spans of every window, without an S x S table.

    start, end       [total] logits
    cls              [windows] position of each window's `[CLS]`
    begins, counts   [windows] position of its first context token, and how many it has
    max_answer_len   most tokens of a span
    wanted           how many spans a window gives, at most

    Returns the null scores `[windows]`, and per window the scores, first and last context tokens
    (counted from the window's first) of its best spans, best first.
    """
    windows, longest = len(cls), int(counts.max())
    width = min(max_answer_len, longest)
    columns = np.arange(longest)
    inside = columns < counts[:, None]  # [windows, longest]
    tokens = np.where(inside, begins[:, None] + columns, 0)
    # End probabilities padded with zeros: a span may not leave its window.
    p_start = np.zeros((windows, longest), np.float32)
    p_end = np.zeros((windows, longest + width - 1), np.float32)
    null = np.ones(windows, np.float32)
    for logits, p in ((start, p_start), (end, p_end)):
        context = np.where(inside, logits[tokens], -np.inf)
        at_cls = logits[cls]
        top = np.maximum(context.max(axis=1), at_cls)
        exp_context = np.exp(context - top[:, None])
        exp_cls = np.exp(at_cls - top)
        total = exp_context.sum(axis=1) + exp_cls
        np.divide(exp_context, total[:, None], out=p[:, :longest])
        null *= exp_cls / total
    # The best `wanted` spans begin at the `wanted` tokens whose best span is best.
    row_best = np.where(inside, p_start * _sliding_max(p_end, width), -1)
    rows = _largest(row_best, min(wanted, longest))
    at = np.arange(windows)[:, None]
    offsets = np.arange(width)
    ends = rows[:, :, None] + offsets  # [windows, rows, width]
    scores = p_start[at, rows][:, :, None] * p_end[at[:, :, None], ends]
    scores = np.where(ends < counts[:, None, None], scores, -1).reshape(windows, -1)
    best = _largest(scores, min(wanted, scores.shape[1]))
    values = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    best = np.take_along_axis(best, order, axis=1)
    values = np.take_along_axis(values, order, axis=1)
    firsts = np.take_along_axis(rows, best // width, axis=1)
    return null, values.tolist(), firsts.tolist(), (firsts + best % width).tolist()


def _largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Columns of the `count` largest values of each row, ascending."""
    columns = values.shape[1]
    if count >= columns:
        return np.broadcast_to(np.arange(columns), values.shape)
    chosen: NDArray[np.int64] = np.argpartition(values, columns - count, axis=1)[:, -count:]
    chosen.sort(axis=1)
    return chosen


def _sliding_max(values: Floats, width: int) -> Floats:
    """max(values[:, i : i + width]) for every i, by doubling; [rows, n - width + 1]."""
    columns = values.shape[1] - width + 1
    span = 1
    while 2 * span <= width:
        values = np.maximum(values[:, :-span], values[:, span:])
        span *= 2
    return np.maximum(values[:, :columns], values[:, width - span : width - span + columns])


def _answers(
    windows: QuestionWindows,
    align_to_words: bool,
    least: float,
    scores: list[list[float]],
    firsts: list[list[int]],
    lasts: list[list[int]],
) -> list[dict[str, Any]]:
    """Spans as text, equal texts merged, in the order they were found.

    least  spans with less than this share of their window's best score are left out
    """
    span, text = windows.context.span, windows.text
    # The best spans share most of their ends.
    places: dict[int, tuple[int, int]] = {}
    answers: dict[str, dict[str, Any]] = {}
    for w, (base, _) in enumerate(windows.spans):
        floor = scores[w][0] * least
        for score, first, last in zip(scores[w], firsts[w], lasts[w], strict=True):
            # Sorted: what follows is smaller still, or past the window's end (negative).
            if score < floor or score < 0:
                break
            for token in (base + first, base + last):
                if token not in places:
                    places[token] = span(token, align_to_words)
            begin, stop = places[base + first][0], places[base + last][1]
            answer = text[begin:stop]
            key = answer.lower()
            known = answers.get(key)
            if known is not None:
                known["score"] += score
            else:
                answers[key] = {"score": score, "start": begin, "end": stop, "answer": answer}
    return list(answers.values())
