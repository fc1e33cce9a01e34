"""Typed wrappers of the ops that the host does beside the encoder: reading texts, choosing spans.

No traced file calls them, so a library may be older than they are; `available` says so. All
tensors are on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ft_handler.errors import LibraryError
from ft_handler.native.library import NAMESPACE, load_library, loaded_library

_ops = getattr(torch.ops, NAMESPACE)

#: 64-bit words of a slot of a chunk memory, and the longest chunk it takes in, in bytes.
SLOT_WORDS, LONGEST_CHUNK = 8, 47
#: Before a chunk in place of a blank where it is its text's first and is read otherwise for that;
#: no byte of UTF-8.
FIRST = b"\xff"
#: A chunk's place is the row of its first token in the table, shifted, and how many tokens it has.
PLACE_SHIFT = 32
#: The place of a chunk that what stands around it may change: its text has to be read whole.
WHOLE = 1 << 62


def available() -> bool:
    """Whether there is a library that has these ops; loads the usual one where none is loaded."""
    if loaded_library() is None:
        try:
            load_library()
        except LibraryError:
            return False
    return hasattr(_ops, "read_chunks")


class ReadChunks(NamedTuple):
    """Texts as the tokens of their chunks.

    ids         [tokens] int64
    origins     [tokens, 4] int32 characters at which each token begins and ends, then its word;
                without rows where they were not asked for
    token_ends  [texts] int64, where each text's tokens end
    whole       texts that have to be read whole; their tokens here are not theirs
    unknown     uint8: the chunks that have no place, one behind the other, each with a blank or
                FIRST before it
    ends        [chunks] int64, where each of `unknown` ends
    """

    ids: Tensor
    origins: Tensor
    token_ends: Tensor
    whole: Tensor
    unknown: Tensor
    ends: Tensor


def read_chunks(
    memory: Tensor,
    table: Tensor,
    text: Tensor,
    ends: Tensor,
    given: Tensor,
    *,
    before: bool,
    behind: bool,
    apart: bool,
    lower: bool,
    located: bool,
) -> ReadChunks:
    """Cut texts at blanks, look the chunks up and lay their tokens end to end.

    memory  int64 [slots, SLOT_WORDS], slots a power of two, zeros but for `remember_chunks`
    table   int32 [rows, 5] tokens of all chunks: id, and as in `origins` characters of the chunk
    text    uint8, the texts in UTF-8 with one byte between two; `ends` int64 [texts]
    given   int64 places of the chunks that the memory lacks, in their order; where they are not as
            many as there are there is no token
    before, behind, apart, lower  as `ft_handler.text.chunking.Chunking` says
    """
    return ReadChunks(
        *_ops.read_chunks(memory, table, text, ends, given, before, behind, apart, lower, located)
    )


def remember_chunks(memory: Tensor, text: Tensor, ends: Tensor, places: Tensor) -> Tensor:
    """Take chunks that are unknown into a memory; [chunks] bool, which of them it keeps.

    text  uint8, the chunks one behind the other, each with a blank or FIRST before it; `ends` int64
          [chunks]
    """
    return cast(Tensor, _ops.remember_chunks(memory, text, ends, places))


def best_spans(
    logits: Tensor, cls: Tensor, begins: Tensor, counts: Tensor, max_answer_len: int, wanted: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ft_handler.tasks.spans.best_spans`, with nothing of a window's depending on the others."""
    return cast(
        "tuple[Tensor, Tensor, Tensor, Tensor]",
        _ops.best_spans(logits, cls, begins, counts, max_answer_len, wanted),
    )
