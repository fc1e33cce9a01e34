"""Long texts in windows that overlap."""

from __future__ import annotations

from ft_handler.errors import RequestTooLarge


def count_windows(tokens: int, room: int, overlap: int) -> int:
    """How many windows of at most `room` tokens there are, of which neighbours share `overlap`."""
    return 1 + max(0, -((room - tokens) // (room - overlap)))


def hold_windows(
    tokens: int, room: int, overlap: int, beside: int, most: int | None, name: str
) -> None:
    """Refuse windows that have too many tokens, before one is made; raises RequestTooLarge.

    beside  tokens that a window has beside its part of the text
    most    tokens of all windows; None is no bound
    name    of the parameter that says how many tokens neighbours share
    """
    # The last window may be shorter than `room`.
    if most is not None and (count_windows(tokens, room, overlap) - 1) * (room + beside) > most:
        raise RequestTooLarge(
            f"the text's windows have over {most} tokens, which is all that is computed for one "
            f"request: send a shorter text, or lower '{name}'"
        )


def window_spans(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Windows [begin, end) of at most `room` tokens; neighbours share `overlap` tokens."""
    begins = range(0, count_windows(tokens, room, overlap) * (room - overlap), room - overlap)
    return [(begin, min(begin + room, tokens)) for begin in begins]


def even_spans(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """As many windows as `window_spans` makes, all of `room` tokens where one is not enough.

    They are spread evenly, so that none sees less of the text than another; neighbours share
    `overlap` tokens or more.
    """
    if tokens <= room:
        return [(0, tokens)]
    last = count_windows(tokens, room, overlap) - 1
    begins = [i * (tokens - room) // last for i in range(last + 1)]
    return [(begin, begin + room) for begin in begins]


def default_overlap(room: int) -> int:
    """What windows of `room` tokens share where nobody says: a quarter, at most 128."""
    return min(room // 4, 128)
