"""What the library does for the host beside the encoder: reading texts, choosing spans.

Arrays in, arrays out. No traced file calls these ops, so a library may be older than they are;
`available` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ft_handler.errors import LibraryError
from ft_handler.native.library import NAMESPACE, load_library, loaded_library

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]

#: The longest chunk that a memory takes in, in bytes.
LONGEST_CHUNK = 47
#: Before a chunk in place of a blank where it is its text's first and is read otherwise for that;
#: no byte of UTF-8.
FIRST = b"\xff"
#: A chunk's place is the row of its first token in the table, shifted, and how many tokens it has.
PLACE_SHIFT = 32
#: The place of a chunk that what stands around it may change: its text has to be read whole.
WHOLE = 1 << 62

_ROW_WORDS = 8


def available() -> bool:
    """Whether there is a library that has these ops; loads the usual one where none is loaded."""
    if loaded_library() is None:
        try:
            load_library()
        except LibraryError:
            return False
    import torch

    return hasattr(getattr(torch.ops, NAMESPACE), "read_chunks")


def answers_available() -> bool:
    """Whether that library also chooses answers."""
    if not available():
        return False
    import torch

    return hasattr(getattr(torch.ops, NAMESPACE), "best_answers")


def joined(texts: Sequence[str]) -> tuple[bytes, Ints]:
    """Texts in UTF-8 with one byte between two, and where each ends, `[texts]`."""
    encoded = [text.encode() for text in texts]
    return b" ".join(encoded), ends_of([*map(len, encoded)], 1)


def _bytes(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(raw), np.uint8)  # torch wants what may be written to


def _call(name: str, arrays: Sequence[NDArray[Any]], *values: Any) -> list[NDArray[Any]]:
    """An op's results."""
    import torch

    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    found = op(*map(torch.from_numpy, arrays), *values)
    return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]


class Cuts(NamedTuple):
    """Where texts may be cut, as `ft_handler.text.chunking.Chunking` says."""

    before: bool
    behind: bool
    apart: bool
    lower: bool


class ReadChunks(NamedTuple):
    """Texts as the tokens of their chunks.

    ids         [tokens]
    origins     [tokens, 4] characters at which each token begins and ends, then its word; without
                rows where they were not asked for
    token_ends  [texts] where each text's tokens end
    whole       texts that have to be read whole; their tokens here are not theirs
    unknown     the chunks that have no place, each with a blank or FIRST before it
    """

    ids: Ints
    origins: NDArray[np.int32]
    token_ends: Ints
    whole: list[int]
    unknown: list[bytes]


def ends_of(sizes: Sequence[int], apart: int) -> Ints:
    """Where parts of some sizes end that lie `apart` bytes from each other."""
    ends = np.array(sizes, np.int64)
    ends += apart
    ends.cumsum(out=ends)
    ends -= apart
    return ends


class ChunkMemory:
    """Places of chunks, for `most` of them and somewhat more."""

    def __init__(self, most: int) -> None:
        # At most half of the slots are taken, so that nearly every chunk finds room. The system
        # gives the memory as it is written to.
        slots = 1 << (2 * max(1, most) - 1).bit_length()
        self._index = np.zeros(slots, np.int32)
        self._rows = np.zeros((slots // 2 + 1, _ROW_WORDS), np.int64)

    def add(self, chunks: Sequence[bytes], places: Sequence[int]) -> NDArray[np.bool_]:
        """Take in chunks that it lacks, as `unknown` spells them; [chunks] whether it keeps each.

        One that is longer than LONGEST_CHUNK, or finds no room, is not kept.
        """
        ends, at = ends_of([*map(len, chunks)], 0), np.array(places, np.int64)
        text = _bytes(b"".join(chunks))
        (kept,) = _call("remember_chunks", (self._index, self._rows, text, ends, at))
        found: NDArray[np.bool_] = kept
        return found

    def read(
        self,
        table: NDArray[np.int32],
        text: bytes,
        ends: Ints,
        given: Ints,
        cuts: Cuts,
        located: bool,
    ) -> ReadChunks:
        """Cut texts at blanks, look the chunks up and lay their tokens end to end.

        table  [rows, 5] tokens of all chunks: id, and as in `origins` characters of the chunk
        text   the texts in UTF-8 with one byte between two, `ends` [texts] where each ends
        given  places of the chunks that the memory lacks, in their order; where they are not as
               many as there are the result has no token
        """
        arrays = self._index, self._rows, table, _bytes(text), ends, given
        ids, origins, token_ends, whole, unknown, stops = _call(
            "read_chunks", arrays, *cuts, located
        )
        chunks: list[bytes] = []
        if len(stops):
            spelled, until = unknown.tobytes(), stops.tolist()
            chunks = [spelled[a:b] for a, b in zip([0, *until], until, strict=False)]
        return ReadChunks(ids, origins, token_ends, whole.tolist(), chunks)


def best_spans(
    logits: Floats, cls: Ints, begins: Ints, counts: Ints, max_answer_len: int, wanted: int
) -> tuple[Floats, Floats, Ints, Ints]:
    """`ft_handler.tasks.spans.best_spans`, where nothing of a window's depends on the others."""
    null, scores, firsts, lasts = _call(
        "best_spans", (logits, cls, begins, counts), max_answer_len, wanted
    )
    return null, scores, firsts, lasts


def best_answers(
    logits: Floats,
    cls: Ints,
    begins: Ints,
    spans: Ints,
    counts: Ints,
    origins: Sequence[NDArray[np.int32]],
    contexts: Sequence[str],
    max_answer_len: int,
    wanted: int,
    top_k: int,
    words: bool,
    least_share: float,
) -> tuple[list[float], list[int], list[float], list[int], list[int]]:
    """Answers to questions; windows as in `ft_handler.tasks.answers.Windows`.

    wanted       spans of a window
    words        whether they are widened to whole words
    least_share  of a window's best score, what a span has to have to count

    Returns by question the least null score of its windows and how many answers were found, -1
    where letters beyond ASCII decide; of all answers, question by question and best first, scores,
    begins and ends in characters.
    """
    text, text_ends = joined(contexts)
    arrays = (
        logits,
        cls,
        begins,
        spans[:, 1] - spans[:, 0],
        np.cumsum(counts),
        np.ascontiguousarray(spans[:, 0]),
        np.concatenate(origins),
        ends_of([*map(len, origins)], 0),
        _bytes(text),
        text_ends,
    )
    null, found, scores, starts, ends = _call(
        "best_answers", arrays, max_answer_len, wanted, top_k, words, least_share
    )
    return null.tolist(), found.tolist(), scores.tolist(), starts.tolist(), ends.tolist()
