"""Token ids of texts made of chunks between blanks, each tokenized once.

Where a tokenizer's words end at blanks, what stands between two of them always gives the same
tokens. Remembering them takes a 25-token sentence from about 50 microseconds to about 3.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import chain, compress

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ft_handler.native import host
from ft_handler.text.chunking import chunking_of
from ft_handler.text.readers import (
    Origins,
    Reader,
    WholeTexts,
    encode_with,
    origins_of,
    split_rows,
)
from ft_handler.types import Ids

_BLANK = b" "
#: Words that are known from the start.
_MOST_WORDS = 1 << 15
#: On average, at most: what is long and no word has many.
_TOKENS_A_CHUNK = 4
_GROUP = 64
#: What stands before the first of several chunks that are tokenized together.
_BEFORE = "a"
_NONE = np.zeros(0, np.int64)
#: Bytes of a chunk that is kept, with what stands before it.
_LONGEST = 1 + host.LONGEST_CHUNK


class RememberedChunks:
    """Token ids of texts made of chunks between blanks, each tokenized once.

    capacity  chunks kept beside the vocabulary's own words; when it is reached the memory starts
              afresh

    Tokens of all chunks lie in one table, [tokens, 5]: id, and as in `Origins` the characters of
    the chunk. The library cuts texts and looks chunks up; what it does not know is tokenized here.
    What may be cut into chunks the tokenizer's `Chunking` says. One thread reads at a time, and
    where reading fails everything is forgotten.

    Raises ValueError for a tokenizer, or a library, that does not fit.
    """

    def __init__(self, tokenizer: Tokenizer, capacity: int = 1 << 16) -> None:
        chunking = chunking_of(tokenizer)
        if chunking is None:
            raise ValueError("words of this tokenizer may reach over blanks")
        if not host.available():
            raise ValueError("the library is older than this")
        self._tokenizer, self._chunking = tokenizer, chunking
        self._cuts = host.Cuts(chunking.before, chunking.behind, chunking.apart, chunking.lower)
        self._lock = threading.Lock()
        self._texts = WholeTexts(tokenizer)
        vocab = tokenizer.get_vocab()
        # In the vocabulary's order, which is by frequency: what is used often lies together.
        in_order = sorted(vocab, key=vocab.__getitem__)
        words = [_BLANK + word.encode() for word in chunking.words(in_order)]
        words = [word for word in words if len(word) <= _LONGEST][:_MOST_WORDS]
        self._capacity = capacity
        self._table, self._used = np.zeros((0, 5), np.int32), 0
        self._words = self._tokenized(words)
        self._word_tokens = self._table[: self._used]
        self._forget()

    def _forget(self) -> None:
        self._memory = host.ChunkMemory(self._capacity + len(self._words))
        self._memory.add([*self._words], [*self._words.values()])
        self._kept = 0  # beside the words
        # Rows that stay, and rows that are taken at all.
        self._table, self._lasting = self._word_tokens, len(self._word_tokens)
        self._used = self._lasting

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether words of this tokenizer end at blanks, as far as is known, and the library can
        cut there."""
        return chunking_of(tokenizer) is not None and host.available()

    @property
    def chunks(self) -> int:
        """How many chunks are kept beside the vocabulary's own words."""
        return self._kept

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without special tokens."""
        return self._alone(texts, located=False)[0]

    def located(self, texts: Sequence[str]) -> tuple[list[Ids], list[Origins]]:
        """Token ids of each text, and where its tokens came from."""
        return self._alone(texts, located=True)

    def _alone(self, texts: Sequence[str], located: bool) -> tuple[list[Ids], list[Origins]]:
        with self._lock:
            try:
                return self._read(texts, located)
            except BaseException:
                self._forget()  # what was being added may be there in part
                raise

    def _read(self, texts: Sequence[str], located: bool) -> tuple[list[Ids], list[Origins]]:
        if not texts:
            return [], []
        found = self._found(texts, located)
        ids = split_rows(found.ids, found.token_ends)
        origins = split_rows(found.origins, found.token_ends) if located else []
        if found.whole:
            self._read_whole(texts, found.whole, ids, origins)
        return ids, origins

    def _found(self, texts: Sequence[str], located: bool) -> host.ReadChunks:
        """The texts' tokens, every chunk of theirs known by then."""
        text, ends = host.joined(texts)
        given = _NONE
        while True:
            found = self._memory.read(self._table, text, ends, given, self._cuts, located)
            if len(found.unknown) == len(given):
                return found
            given = self._learn(found.unknown)

    def _read_whole(
        self, texts: Sequence[str], which: Sequence[int], ids: list[Ids], origins: list[Origins]
    ) -> None:
        """Put in place what some texts are when they are read whole."""
        chosen = [texts[i] for i in which]
        if origins:
            found, places = self._texts.located(chosen)
            for i, place in zip(which, places, strict=True):
                origins[i] = place
        else:
            found = self._texts.ids(chosen)
        for i, one in zip(which, found, strict=True):
            ids[i] = one

    def _learn(self, chunks: Sequence[bytes]) -> NDArray[np.int64]:
        """Tokenize chunks; the places of those that are not kept, in their order.

        Where the memory is full everything is forgotten instead, and none is given.
        """
        new = dict.fromkeys(chunks)
        most = self._capacity + len(self._words)
        full = len(self._words) + self._kept + len(new) > most
        if self._kept and (full or self._lasting > _TOKENS_A_CHUNK * most):
            self._forget()
            return _NONE
        self._used = self._lasting  # over what an earlier call did not keep
        # Long chunks are rarely words, and would let a client fill the memory.
        short = [chunk for chunk in new if len(chunk) <= _LONGEST]
        places = self._tokenized(short)
        room = self._memory.add(short, [places[chunk] for chunk in short])
        kept = set(compress(short, room.tolist()))
        self._kept += len(kept)
        self._lasting = self._used
        places.update(self._tokenized([chunk for chunk in new if len(chunk) > _LONGEST]))
        return np.array([places[chunk] for chunk in chunks if chunk not in kept], np.int64)

    def _tokenized(self, chunks: Sequence[bytes]) -> dict[bytes, int]:
        """Tokenize chunks into the table, many in one text: a call costs more than a word."""
        firsts = [chunk[1:].decode() for chunk in chunks if chunk.startswith(host.FIRST)]
        others = [chunk[1:].decode() for chunk in chunks if not chunk.startswith(host.FIRST)]
        certain = self._chunking.certain
        alone = [[chunk] for chunk in firsts if certain(chunk, True)]
        words = [chunk for chunk in others if chunk and certain(chunk, False)]
        together = [[_BEFORE, *words[i : i + _GROUP]] for i in range(0, len(words), _GROUP)]
        if "" in others:
            together.append([_BEFORE, ""])  # what a text ends with
        places = dict.fromkeys(chunks, host.WHOLE)
        places.update(self._grouped(alone, host.FIRST))
        places.update(self._grouped(together, _BLANK))
        return places

    def _grouped(self, groups: Sequence[Sequence[str]], lead: bytes) -> dict[bytes, int]:
        """The places of chunks that were put into the table, group by group, with `lead`'s byte
        before each, which is a blank where a group begins with what is no chunk."""
        if not groups:
            return {}
        encodings = encode_with(self._tokenizer.encode_batch, [" ".join(group) for group in groups])
        reaching = [not self._chunking.uncertain.isdisjoint(e.ids) for e in encodings]
        if any(reaching) and max(map(len, groups)) > 2:
            return self._grouped([[_BEFORE, c] for group in groups for c in group[1:]], lead)
        origins = origins_of(encodings)
        # Characters counted through all texts, one between two. The first token of a chunk is the
        # first that ends behind the blank before it, whether or not it begins with the blank.
        widths = np.array([len(chunk) + 1 for group in groups for chunk in group])
        begins = np.cumsum(widths) - widths
        sizes = np.array([*map(len, groups)])
        leading = np.cumsum(sizes) - sizes
        origins += np.repeat(begins[leading], [len(e) for e in encodings])[:, None]
        firsts = np.searchsorted(origins[:, 1], begins - 1, side="right")
        counts = np.diff(firsts, append=len(origins))
        origins -= np.repeat(begins, counts)[:, None]
        rows = np.column_stack((np.array([i for e in encodings for i in e.ids], np.int32), origins))
        real = np.ones(len(begins), np.bool_)
        real[leading] = lead == host.FIRST
        rows, counts = rows[np.repeat(real, counts)], counts[real]
        end = self._used + len(rows)
        if end > len(self._table):
            grown = np.empty((2 * end, 5), np.int32)
            grown[: self._used] = self._table[: self._used]
            self._table = grown
        self._table[self._used : end] = rows
        places = (np.cumsum(counts) - counts + self._used << host.PLACE_SHIFT) + counts
        self._used = end
        places[np.repeat(reaching, sizes)[real]] = host.WHOLE
        names = [
            lead + c.encode() for c, is_real in zip(chain(*groups), real, strict=True) if is_real
        ]
        return dict(zip(names, places.tolist(), strict=True))


def reader_of(tokenizer: Tokenizer, remember: bool = True) -> Reader:
    """The faster reader where the tokenizer, the library, and who asks, allow it."""
    if remember and RememberedChunks.fits(tokenizer):
        return RememberedChunks(tokenizer)
    return WholeTexts(tokenizer)
