"""Which shapes get a CUDA graph."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


#: The most the driver was seen to keep for an instantiated graph beside its pool (307 KiB, H200).
GRAPH_BYTES = 308 << 10


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """Which shapes get a CUDA graph: token classes, capacities in sequences, longest lengths.

    A batch of (total, batch, max_seqlen) replays the smallest graph that holds all three. Token
    classes are 32 rows apart at first and grow by about an eighth later, 512 rows at most, so fewer
    than a seventh of a replay's rows are idle from 256 tokens on.
    """

    tokens: tuple[int, ...]
    sequences: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, max_tokens: int, max_sequences: int, max_length: int) -> GraphPlan:
        """Classes up to `max_tokens` tokens, `max_sequences` sequences of `max_length` tokens."""
        tokens: list[int] = []
        step = 32
        while not tokens or tokens[-1] < max_tokens:
            size = (tokens[-1] if tokens else 0) + step
            tokens.append(size)
            # Steps stay multiples of 32 rows, at least an eighth of the class, 512 at most.
            step = min(512, max(32, 2 ** int(np.log2(size / 8))))
        sequences = sorted({1, min(8, max_sequences), max_sequences})
        lengths = [n for n in (64, 128, 256) if n < max_length] + [max_length]
        return cls(tuple(tokens), tuple(sequences), tuple(lengths))

    def class_of(self, total: int, batch: int, max_seqlen: int) -> tuple[int, int, int] | None:
        """The smallest (tokens, sequences, length) that holds a batch; None when none does."""
        found = []
        for value, sizes in (
            (total, self.tokens),
            (batch, self.sequences),
            (max_seqlen, self.lengths),
        ):
            at = bisect.bisect_left(sizes, value)
            if at == len(sizes):
                return None
            found.append(sizes[at])
        return found[0], found[1], found[2]

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """Every class that some batch falls into, small ones first."""
        below_tokens = dict(zip(self.tokens, (0, *self.tokens), strict=False))
        below_lengths = dict(zip(self.lengths, (0, *self.lengths), strict=False))
        below_sequences = dict(zip(self.sequences, (0, *self.sequences), strict=False))
        for tokens in self.tokens:
            for sequences in self.sequences:
                for length in self.lengths:
                    most = sequences * length
                    least = below_sequences[sequences] + below_lengths[length]
                    if most > below_tokens[tokens] and least < tokens:
                        yield tokens, sequences, length


def graph_ints(shape: tuple[int, int, int]) -> int:
    """Integers that a batch of a class brings: ids, types, cu_seqlens."""
    tokens, sequences, _ = shape
    return 2 * tokens + sequences + 1
