"""Answers to questions: the best spans of their contexts' windows, those of one text as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ft_handler.native import host
from ft_handler.tasks.spans import best_spans
from ft_handler.text.readers import Origins
from ft_handler.types import Floats

#: Score, first character, end, text.
Answer: TypeAlias = tuple[float, int, int, str]
score_of = itemgetter(0)

#: Of a single answer: twelve spans left out change its score by 1e-5 of it at most.
_LEAST_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of questions' contexts, the windows of one question after those of another.

    contexts  [questions]
    origins   [questions] characters of each context's tokens, as `readers.origins_of` has them
    counts    [questions] how many windows each has
    spans     [windows, 2] the context's tokens [begin, end) in each
    cls       [windows] position of its `[CLS]` among the logits
    begins    [windows] position of its first context token there
    """

    contexts: list[str]
    origins: list[Origins]
    counts: NDArray[np.int64]
    spans: NDArray[np.int64]
    cls: NDArray[np.int64]
    begins: NDArray[np.int64]

    def of(self, questions: Sequence[int]) -> Windows:
        """Those of some of the questions, which are given in their order."""
        chosen = np.isin(np.repeat(np.arange(len(self.counts)), self.counts), questions)
        return Windows(
            [self.contexts[i] for i in questions],
            [self.origins[i] for i in questions],
            self.counts[questions],
            self.spans[chosen],
            self.cls[chosen],
            self.begins[chosen],
        )


class Wanted(NamedTuple):
    """What is wanted of every question.

    top_k           most answers
    max_answer_len  most tokens of one
    align_to_words  whether answers are widened to whole words
    """

    top_k: int
    max_answer_len: int
    align_to_words: bool

    @property
    def spans(self) -> int:
        """Of a window: several may become one answer."""
        return 2 * self.top_k + 10 if self.align_to_words else self.top_k

    @property
    def least_share(self) -> float:
        """Of a window's best score, what a span has to have to count."""
        return _LEAST_SHARE if self.top_k == 1 else 0.0


def best_answers(
    logits: Floats, windows: Windows, wanted: Wanted
) -> tuple[list[list[Answer]], list[float]]:
    """Each question's best answers, best first, and the least null score of its windows.

    logits  [2, total] start and end

    Spans with the same text, case aside, are one answer: that of the first, their scores added.
    """
    if not host.answers_available():
        return answers_of_spans(logits, windows, wanted)
    null, found, scores, begins, ends = host.best_answers(
        np.ascontiguousarray(logits),
        windows.cls,
        windows.begins,
        windows.spans,
        windows.counts,
        windows.origins,
        windows.contexts,
        wanted.max_answer_len,
        wanted.spans,
        wanted.top_k,
        wanted.align_to_words,
        wanted.least_share,
    )
    rows = zip(scores, begins, ends, strict=True)
    answers = [
        [(p, b, e, context[b:e]) for p, b, e in islice(rows, max(0, n))]
        for context, n in zip(windows.contexts, found, strict=True)
    ]
    if min(found) < 0:  # letters beyond ASCII decide
        undecided = [i for i, n in enumerate(found) if n < 0]
        decided, _ = answers_of_spans(logits, windows.of(undecided), wanted)
        for i, own in zip(undecided, decided, strict=True):
            answers[i] = own
    return answers, null


def answers_of_spans(
    logits: Floats, windows: Windows, wanted: Wanted
) -> tuple[list[list[Answer]], list[float]]:
    """The same of any texts, and where the library is older than its op."""
    spans, counts = windows.spans, windows.counts
    null, scores, firsts, lasts = best_spans(
        logits,
        windows.cls,
        windows.begins,
        spans[:, 1] - spans[:, 0],
        wanted.max_answer_len,
        wanted.spans,
    )
    origins = np.concatenate(windows.origins)
    tokens = np.array([*map(len, windows.origins)])
    # The row of `origins` that each window's first token has.
    rows = (np.repeat(np.cumsum(tokens) - tokens, counts) + spans[:, 0])[:, None]
    begin, end = (2, 3) if wanted.align_to_words else (0, 1)
    begins = origins[:, begin].take(rows + firsts, mode="clip")
    ends = origins[:, end].take(rows + lasts, mode="clip")
    # How many of a window's spans count; what reaches past its end scores below zero.
    floors = scores[:, :1] * wanted.least_share
    counted = np.add.reduce(scores >= floors, axis=1).tolist()
    kept = zip(counted, scores.tolist(), begins.tolist(), ends.tolist(), strict=True)
    found = [(p[:n], b[:n], e[:n]) for n, p, b, e in kept]
    answers: list[list[Answer]] = []
    least: list[float] = []
    window = 0
    for context, count in zip(windows.contexts, counts.tolist(), strict=True):
        p, b, e = zip(*found[window : window + count], strict=True)
        own = [*chain(*p)], [*chain(*b)], [*chain(*e)]
        answers.append(_merged(context, *own, wanted.top_k))
        least.append(float(null[window : window + count].min()))
        window += count
    return answers, least


def _merged(
    text: str, scores: list[float], begins: list[int], stops: list[int], most: int
) -> list[Answer]:
    """The best `most` answers, best first.

    scores, begins, stops  of all spans of a question that count, of each window the best first
    """
    # Of slices: what a character becomes may depend on the characters beside it.
    keys = [text[a:b].lower() for a, b in zip(begins, stops, strict=True)]
    totals: dict[str, float] = {}
    for key, score in zip(keys, scores, strict=True):
        totals[key] = totals.get(key, 0.0) + score
    best = sorted(totals, key=totals.__getitem__, reverse=True)[:most]
    places = [keys.index(key) for key in best]
    return [
        (totals[key], begins[at], stops[at], text[begins[at] : stops[at]])
        for key, at in zip(best, places, strict=True)
    ]
