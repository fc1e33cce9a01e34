"""The best spans of windows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ft_handler.native import host
from ft_handler.types import Floats

#: Null scores, scores, first and last tokens.
Spans = tuple[Floats, Floats, NDArray[np.int64], NDArray[np.int64]]


def best_spans(
    logits: Floats,
    cls: NDArray[np.int64],
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
    max_answer_len: int,
    wanted: int,
) -> Spans:
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
    if not host.available():
        return spans_of_arrays(logits, cls, begins, counts, max_answer_len, wanted)
    whole = np.ascontiguousarray(logits)
    return host.best_spans(whole, cls, begins, counts, max_answer_len, wanted)


def spans_of_arrays(
    logits: Floats,
    cls: NDArray[np.int64],
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
    max_answer_len: int,
    wanted: int,
) -> Spans:
    """The same where the library is older than its op.

    A window's scores may differ in the last digits by what else there is.
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
