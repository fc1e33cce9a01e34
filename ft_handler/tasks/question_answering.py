"""A question about a context, answered by spans of it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ft_handler.tasks.marks import mark_truncated
from ft_handler.tasks.scores import Floats
from ft_handler.tasks.spans import best_spans
from ft_handler.types import (
    Encoding,
    ModelInput,
    Prediction,
    QuestionParams,
    QuestionWindows,
)

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
                    mark_truncated(answer)
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
