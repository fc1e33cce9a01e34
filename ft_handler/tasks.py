"""Head output to Prediction: one class a task, vectorised over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
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
        lengths = np.array([len(s) for e in encodings for s in e.sequences])
        begins = np.cumsum(lengths) - lengths
        owners = np.repeat(np.arange(len(inputs)), [len(e.sequences) for e in encodings])
        logits = np.stack([start, end])
        predictions: list[Prediction] = [{}] * len(inputs)
        for params, members in groups.items():
            answers = self._group(
                params,
                [_windows_of(encodings[i]) for i in members],
                begins if len(groups) == 1 else begins[np.isin(owners, members)],
                logits,
            )
            for i, answer in zip(members, answers, strict=True):
                if encodings[i].truncated:
                    _mark_truncated(answer)
                predictions[i] = answer
        return predictions

    def _group(
        self,
        params: QuestionParams,
        questions: Sequence[QuestionWindows],
        cls: NDArray[np.int64],
        logits: Floats,
    ) -> list[Prediction]:
        """Answers of questions with the same parameters; `cls` is where their windows begin."""
        windows = [len(q.spans) for q in questions]
        spans = np.array([span for q in questions for span in q.spans])
        counts = spans[:, 1] - spans[:, 0]
        null, scores, firsts, lasts = best_spans(
            logits,
            cls,
            cls + np.repeat([q.first for q in questions], windows),
            counts,
            params.max_answer_len,
            2 * params.top_k + 10 if params.align_to_words else params.top_k,
        )
        origins = np.concatenate([q.origins for q in questions])
        tokens = np.array([len(q.origins) for q in questions])
        # The row of `origins` that each window's first token has.
        rows = (np.repeat(np.cumsum(tokens) - tokens, windows) + spans[:, 0])[:, None]
        begin, end = (2, 3) if params.align_to_words else (0, 1)
        # What reaches past its window scores below zero and is never read.
        begins = origins[:, begin].take(rows + firsts, mode="clip")
        ends = origins[:, end].take(rows + lasts, mode="clip")
        floors = scores[:, 0] * (_LEAST_SHARE if params.top_k == 1 else 0)
        found = list(
            zip(floors.tolist(), scores.tolist(), begins.tolist(), ends.tolist(), strict=True)
        )
        predictions: list[Prediction] = []
        window = 0
        for question, count in zip(questions, windows, strict=True):
            until = window + count
            answers = _answers(question.text, found[window:until])
            if params.handle_impossible_answer:
                answers.append((float(null[window:until].min()), 0, 0, ""))
            window = until
            if params.top_k == 1:
                predictions.append(_answer(max(answers, key=_score)))
            else:
                answers.sort(key=_score, reverse=True)
                predictions.append([_answer(a) for a in answers[: params.top_k]])
        return predictions


def _windows_of(encoding: Encoding) -> QuestionWindows:
    assert encoding.windows is not None
    return encoding.windows


def best_spans(
    logits: Floats,
    cls: NDArray[np.int64],
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
    max_answer_len: int,
    wanted: int,
) -> tuple[Floats, Floats, NDArray[np.int64], NDArray[np.int64]]:
    """The best spans of every window, without an S x S table.

    logits           [2, total] start and end
    cls              [windows] position of each window's `[CLS]`
    begins, counts   [windows] position of its first context token, and how many it has
    max_answer_len   most tokens of a span
    wanted           how many spans a window gives, at most

    Returns the null scores `[windows]`, and as `[windows, found]` the scores, first and last
    context tokens (counted from the window's first) of the best spans, best first. Where a window
    has fewer, what is left scores below zero.
    """
    windows, longest = len(cls), int(counts.max())
    width = min(max_answer_len, longest)
    columns = np.arange(longest)
    inside: NDArray[np.bool_] = columns < counts[:, None]  # [windows, longest]
    tokens = np.where(inside, begins[:, None] + columns, 0)
    # Probabilities of start and end over `[CLS]` and the context.
    at_cls = logits.take(cls, axis=1)
    p: Floats = np.where(inside, logits.take(tokens, axis=1), np.float32(-np.inf))
    top: Floats = np.maximum(p.max(axis=2), at_cls)
    p -= top[:, :, None]
    np.exp(p, out=p)
    p_cls: Floats = np.exp(at_cls - top)
    total: Floats = p.sum(axis=2) + p_cls
    p /= total[:, :, None]
    p_cls /= total
    # End probabilities padded with zeros: a span may not leave its window.
    p_end = np.zeros((windows, longest + width - 1), np.float32)
    p_end[:, :longest] = p[1]
    # The best `wanted` spans begin at the `wanted` tokens whose best span is best.
    row_best: Floats = np.where(inside, p[0] * _sliding_max(p_end, width), np.float32(-1))
    rows = _largest(row_best, min(wanted, longest))
    at = np.arange(windows)[:, None]
    ends = rows[:, :, None] + np.arange(width)  # [windows, rows, width]
    scores = p_end.take(ends + at[:, :, None] * p_end.shape[1])
    scores *= p[0][at, rows][:, :, None]
    scores[ends >= counts[:, None, None]] = -1
    table = scores.reshape(windows, -1)
    best = _largest(table, min(wanted, table.shape[1]))
    best = best[at, np.argsort(-table[at, best], axis=1, kind="stable")]
    firsts = rows[at, best // width]
    return p_cls[0] * p_cls[1], table[at, best], firsts, firsts + best % width


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


#: Score, first character, end, text.
_Answer = tuple[float, int, int, str]
_score = itemgetter(0)


def _answers(
    text: str, windows: Sequence[tuple[float, list[float], list[int], list[int]]]
) -> list[_Answer]:
    """Spans as text, texts that are equal but for case merged, in the order they were found.

    windows  of each the least score of a span that counts (none is negative), and the scores,
             begins and ends of its spans, best first
    """
    answers: dict[str, _Answer] = {}
    for floor, scores, begins, stops in windows:
        for score, begin, stop in zip(scores, begins, stops, strict=True):
            if score < floor:
                break
            answer = text[begin:stop]
            key = answer.lower()
            known = answers.get(key)
            if known is None:
                answers[key] = (score, begin, stop, answer)
            else:
                answers[key] = (known[0] + score, *known[1:])
    return list(answers.values())


def _answer(found: _Answer) -> dict[str, Any]:
    score, begin, stop, text = found
    return {"score": score, "start": begin, "end": stop, "answer": text}
