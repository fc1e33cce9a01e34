"""Texts to token ids, and where the tokens came from, by the tokenizers library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ft_handler.types import Ids

#: [tokens, 4] characters: begin and end of each token, then of its word.
Origins: TypeAlias = NDArray[np.int32]


def origins_of(encodings: Sequence[Any]) -> Origins:
    """Characters of every token of the library's encodings, and of its word, as [tokens, 4].

    A token without a word is a word of its own.
    """
    own = np.array([*chain.from_iterable(e.offsets for e in encodings)], np.int32).reshape(-1, 2)
    if not len(own):
        return np.zeros((0, 4), np.int32)
    numbers = np.array(
        [-1 if word is None else word for e in encodings for word in e.word_ids], np.int64
    )
    # A word is a run of tokens with the same number.
    begins = numbers < 0
    begins[1:] |= numbers[1:] != numbers[:-1]
    counts = np.array([len(e) for e in encodings])
    begins[(np.cumsum(counts) - counts)[counts > 0]] = True
    firsts, word_of = np.flatnonzero(begins), np.cumsum(begins) - 1
    lasts = np.append(firsts[1:], len(own)) - 1
    # Not the least and the largest: so the library has it.
    return np.column_stack((own, own[firsts, 0][word_of], own[lasts, 1][word_of]))


def split_rows(rows: NDArray[Any], ends: NDArray[np.int64]) -> list[NDArray[Any]]:
    """`rows` cut into pieces that end at `ends`."""
    stops = ends.tolist()
    return [rows[begin:stop] for begin, stop in zip([0, *stops], stops, strict=False)]


def encode_with(call: Callable[..., Sequence[Any]], texts: Sequence[str]) -> Sequence[Any]:
    """Encodings of texts by a method of the library, without special tokens.

    Raises RuntimeError where the library panics, which it does past `Exception`.
    """
    try:
        return call(list(texts), add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        # Its message may quote the text.
        raise RuntimeError("the tokenizers library panicked") from None


class Reader(Protocol):
    """Makes token ids of texts; safe from several threads."""

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without special tokens."""

    def located(self, texts: Sequence[str]) -> tuple[list[Ids], list[Origins]]:
        """Token ids of each text, and where its tokens came from."""


class WholeTexts:
    """Token ids and origins straight from the library, for any tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without special tokens, in one call of the library."""
        encoded = encode_with(self._tokenizer.encode_batch_fast, texts)
        return [np.array(e.ids, np.int64) for e in encoded]

    def located(self, texts: Sequence[str]) -> tuple[list[Ids], list[Origins]]:
        """Token ids of each text, and where its tokens came from."""
        encoded = encode_with(self._tokenizer.encode_batch, texts)
        ids = [np.array(e.ids, np.int64) for e in encoded]
        return ids, split_rows(origins_of(encoded), np.cumsum([len(e) for e in encoded]))
