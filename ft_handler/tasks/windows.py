"""Long texts in windows that overlap."""

from __future__ import annotations


def window_spans(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Windows [begin, end) of at most `room` tokens; neighbours share `overlap` tokens."""
    spans = []
    for begin in range(0, max(tokens, 1), room - overlap):
        end = min(begin + room, tokens)
        spans.append((begin, end))
        if end == tokens:
            break
    return spans


def even_spans(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """As many windows as `window_spans` makes, all of `room` tokens where one is not enough.

    They are spread evenly, so that none sees less of the text than another; neighbours share
    `overlap` tokens or more.
    """
    if tokens <= room:
        return [(0, tokens)]
    last = len(window_spans(tokens, room, overlap)) - 1
    begins = [i * (tokens - room) // last for i in range(last + 1)]
    return [(begin, begin + room) for begin in begins]


def default_overlap(room: int) -> int:
    """What windows of `room` tokens share where nobody says: a quarter, at most 128."""
    return min(room // 4, 128)
