"""Token ids of texts made of chunks between blanks, each tokenized once.

BERT's words never reach over a blank, so what stands between two blanks always gives the same
tokens. Remembering them takes a 25-token sentence from about 50 microseconds to about 5.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from ft_handler.text.readers import (
    Origins,
    Reader,
    WholeTexts,
    encode_with,
    origins_of,
    split_rows,
)
from ft_handler.types import Ids

#: A chunk's place: the row of its first token in the table, shifted, and how many tokens it has.
_SHIFT = 32
#: The place of a chunk with an added token that takes in blanks: its text is read whole.
_WHOLE = 1 << 62

_KEY_BYTES = 15
_BUCKETS = 16  # bits
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)  # odd, bits mixed
#: By a chunk's bytes, the longest ones last: what of the key's two words belongs to it.
_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_HIGH_BYTES = np.array(
    [(1 << 8 * max(0, min(n, _KEY_BYTES) - 8)) - 1 for n in range(17)], np.uint64
)
_LENGTHS = np.array([n + 1 << 56 for n in range(17)], np.uint64)


class _Text:
    """Texts in UTF-8 with a blank between, and the chunks between the blanks.

    joined, text_sizes   all texts, and how many bytes each has
    begins, sizes  [chunks] in bytes
    last_chunks    [texts] index of each text's last chunk
    """

    def __init__(self, joined: bytes, text_sizes: Sequence[int]) -> None:
        # Behind the last chunk there have to be as many bytes as a key reads.
        self.raw = joined + bytes(16)
        self._codes = np.frombuffer(self.raw, np.uint8)
        blanks = np.flatnonzero(self._codes == ord(" "))
        bounds = np.concatenate(([-1], blanks, [len(joined)]))
        self.begins = bounds[:-1] + 1
        self.sizes = bounds[1:] - self.begins
        text_ends = np.cumsum(text_sizes) + np.arange(len(text_sizes))
        self.last_chunks = np.searchsorted(blanks, text_ends)

    def chunks(self, which: NDArray[np.int64]) -> list[str]:
        """Some chunks as text."""
        begins, sizes = self.begins[which].tolist(), self.sizes[which].tolist()
        return [self.raw[b : b + n].decode() for b, n in zip(begins, sizes, strict=True)]

    def keys(self) -> NDArray[np.uint64]:
        """[2, chunks] each chunk's first 15 bytes and its length: equal only if the chunks are,
        when they are no longer."""
        words = np.ndarray((len(self.raw) - 7,), "<u8", self.raw, strides=(1,))
        low = words[self.begins] & _LOW_BYTES.take(self.sizes, mode="clip")
        high = words[self.begins + 8] & _HIGH_BYTES.take(self.sizes, mode="clip")
        high |= _LENGTHS.take(self.sizes, mode="clip")
        return np.stack([low, high])

    def characters(self) -> NDArray[np.int32]:
        """[chunks] how many characters of its text precede each chunk."""
        begins = self.begins
        if not self.raw.isascii():
            leads = (self._codes & 0xC0) != 0x80
            begins = (np.cumsum(leads) - leads)[begins]
        first_chunks = np.concatenate(([0], self.last_chunks[:-1] + 1))
        firsts = np.repeat(begins[first_chunks], np.diff(self.last_chunks, prepend=-1))
        within: NDArray[np.int64] = begins - firsts
        return within.astype(np.int32)


class _ShortChunks:
    """Places of chunks of at most 15 bytes, found for a whole batch at once.

    A hash table, [buckets, 2, 3]: keys as in `_Text` and the place. A bucket has room for two
    chunks; one that finds no room is left out, and those who look for it have to look elsewhere.
    """

    def __init__(self, table: NDArray[np.uint64] | None = None) -> None:
        self._table = np.zeros((1 << _BUCKETS, 6), np.uint64) if table is None else table

    def copy(self) -> _ShortChunks:
        return _ShortChunks(self._table.copy())

    @staticmethod
    def _buckets(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        mixed = (keys[0] ^ keys[1] * _FACTORS[0]) * _FACTORS[1]
        buckets: NDArray[np.uint64] = mixed >> np.uint64(64 - _BUCKETS)
        return buckets.astype(np.int64)

    def add(self, text: _Text, places: NDArray[np.int64]) -> None:
        """Take in the chunks of a text that are short enough and find room."""
        keys = text.keys()
        buckets = self._buckets(keys)
        rows = np.stack([*keys, places.astype(np.uint64)], axis=1)
        rest = np.flatnonzero(text.sizes <= _KEY_BYTES)
        for at in (0, 3):
            free = rest[self._table[buckets[rest], at + 1] == 0]
            first = free[np.unique(buckets[free], return_index=True)[1]]  # of those in one bucket
            self._table[buckets[first], at : at + 3] = rows[first]
            rest = np.setdiff1d(rest, first)

    def find(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The place of every chunk, and whether it was found."""
        rows = self._table.take(self._buckets(keys), axis=0)
        first = (rows[:, 0] == keys[0]) & (rows[:, 1] == keys[1])
        second = (rows[:, 3] == keys[0]) & (rows[:, 4] == keys[1])
        return np.where(first, rows[:, 2], rows[:, 5]).astype(np.int64), first | second


_LONGEST_CHUNK = 48
#: On average, at most: what is long and no word has many.
_TOKENS_A_CHUNK = 4
_GROUP = 64


class RememberedChunks:
    """Token ids of texts made of chunks between blanks, each tokenized once.

    capacity  chunks kept beside the vocabulary's own words; when it is reached the memory starts
              afresh

    Tokens of all chunks lie in one table, [tokens, 5]: id, and as in `Origins` the characters of
    the chunk. Short chunks are looked up as arrays, a batch at once; the others one by one.

    Added tokens are found within a chunk, whatever stands around it; only those that take in blanks
    reach into what is around them, and a text with one of these is read whole. One thread reads
    at a time, and where reading fails everything is forgotten.
    """

    def __init__(self, tokenizer: Tokenizer, capacity: int = 1 << 16) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._texts = WholeTexts(tokenizer)
        normalizer = tokenizer.normalizer
        tokens = tokenizer.get_added_tokens_decoder()
        self._greedy = {i for i, token in tokens.items() if token.lstrip or token.rstrip}
        added = [token.content for token in tokens.values()]
        # Lower-casing ASCII first makes more chunks equal; special tokens have a case.
        self._lower = bool(
            isinstance(normalizer, BertNormalizer)
            and normalizer.lowercase
            and all("[" in content for content in added)
        )
        vocab = tokenizer.get_vocab()
        # In the vocabulary's order, which is by frequency: what is used often lies together.
        words = sorted(
            (w for w in vocab if w.isalnum() and len(w) <= _LONGEST_CHUNK), key=vocab.__getitem__
        )
        self._words: dict[str, int] = {}
        self._short_words = _ShortChunks()
        self._places, self._short = self._words, self._short_words
        self._table, self._used = np.zeros((0, 5), np.int32), 0
        self._add(words)
        self._word_tokens = self._table[: self._used]
        self._capacity = capacity + len(words)
        self._forget()

    def _forget(self) -> None:
        self._places, self._short = dict(self._words), self._short_words.copy()
        self._table, self._used = self._word_tokens, len(self._word_tokens)

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        """Whether words of this tokenizer end at blanks, whatever stands around them."""
        normalizer = tokenizer.normalizer
        if not (
            isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
            and isinstance(normalizer, (BertNormalizer, type(None)))
        ):
            return False
        sought = []
        for token in tokenizer.get_added_tokens_decoder().values():
            sought.append(token.content)
            if token.normalized and normalizer is not None:
                sought.append(normalizer.normalize_str(token.content))
        return all(content and " " not in content for content in sought)

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
        encoded = [text.encode() for text in texts]
        joined = b" ".join(encoded)
        if self._lower and b"[" not in joined:
            joined = joined.lower()
        elif self._lower:
            joined = b" ".join(text if b"[" in text else text.lower() for text in encoded)
        text = _Text(joined, list(map(len, encoded)))
        places, passing = self._look_up(text)
        counts = places & (1 << _SHIFT) - 1
        ends = np.cumsum(counts)
        # Row of the table that each token has: its chunk's first row, and on from there.
        rows = np.repeat((places >> _SHIFT) - ends + counts, counts)
        rows += np.arange(len(rows))
        text_ends = ends[text.last_chunks]
        found = self._table.take(rows, axis=0)
        ids = split_rows(found[:, 0].astype(np.int64), text_ends)
        origins: list[Origins] = []
        if located:
            found += np.repeat(text.characters(), counts)[:, None]
            origins = split_rows(found[:, 1:], text_ends)
        if passing:
            self._drop(passing)
        if self._greedy:
            self._read_whole(texts, np.flatnonzero(places == _WHOLE), text, ids, origins)
        return ids, origins

    def _read_whole(
        self,
        texts: Sequence[str],
        chunks: NDArray[np.int64],
        text: _Text,
        ids: list[Ids],
        origins: list[Origins],
    ) -> None:
        """Put in place what the texts of some chunks are when they are read whole."""
        if not len(chunks):
            return
        which = np.unique(np.searchsorted(text.last_chunks, chunks)).tolist()
        chosen = [texts[i] for i in which]
        if origins:
            found, places = self._texts.located(chosen)
            for i, place in zip(which, places, strict=True):
                origins[i] = place
        else:
            found = self._texts.ids(chosen)
        for i, one in zip(which, found, strict=True):
            ids[i] = one

    def _look_up(self, text: _Text) -> tuple[NDArray[np.int64], list[str]]:
        """The place of every chunk, and those that should be forgotten again."""
        keys = text.keys()
        places, known = self._short.find(keys)
        if known.all():
            return places, []
        rest = np.flatnonzero(~known)
        chunks = text.chunks(rest)
        passing: list[str] = []
        new = {chunk for chunk in chunks if chunk not in self._places}
        if new:
            full = len(self._places) + len(new) > self._capacity
            if full or self._used > _TOKENS_A_CHUNK * self._capacity:
                self._forget()
                new = {*text.chunks(np.arange(len(places)))} - self._places.keys()
            # Long chunks are rarely words, and would let a client fill the memory.
            passing = [chunk for chunk in new if len(chunk) > _LONGEST_CHUNK]
            self._add([chunk for chunk in new if len(chunk) <= _LONGEST_CHUNK] + passing)
            places, known = self._short.find(keys)
            rest = np.flatnonzero(~known)
            chunks = text.chunks(rest)
        places[rest] = [self._places[chunk] for chunk in chunks]
        return places, passing

    def _drop(self, chunks: Sequence[str]) -> None:
        """Forget the chunks that were added last."""
        self._used -= sum(self._places.pop(chunk) & (1 << _SHIFT) - 1 for chunk in chunks)

    def _add(self, chunks: Sequence[str]) -> None:
        """Tokenize chunks into the table, many in one text: a call costs more than a word."""
        if not chunks:
            return
        groups = [chunks[i : i + _GROUP] for i in range(0, len(chunks), _GROUP)]
        encodings = self._encode(groups)
        if self._greedy and any(map(self._takes_blanks, encodings)):
            groups = [[chunk] for chunk in chunks]
            encodings = self._encode(groups)
        origins = origins_of(encodings)
        # Characters counted through all texts, a blank between two.
        widths = np.array([len(chunk) + 1 for chunk in chunks])
        begins = np.cumsum(widths) - widths
        leading = np.cumsum([0, *map(len, groups)])[:-1]
        origins += np.repeat(begins[leading], [len(e) for e in encodings])[:, None]
        # The first token of every chunk is the first that begins at the chunk or after it.
        firsts = np.searchsorted(origins[:, 0], begins)
        counts = np.diff(firsts, append=len(origins))
        origins -= np.repeat(begins, counts)[:, None]
        end = self._used + len(origins)
        if end > len(self._table):
            grown = np.empty((2 * end, 5), np.int32)
            grown[: self._used] = self._table[: self._used]
            self._table = grown
        self._table[self._used : end, 0] = [i for e in encodings for i in e.ids]
        self._table[self._used : end, 1:] = origins
        places = (firsts + self._used << _SHIFT) + counts
        if len(groups) == len(chunks) and self._greedy:
            places[[self._takes_blanks(e) for e in encodings]] = _WHOLE
        self._places.update(zip(chunks, places.tolist(), strict=True))
        encoded = [chunk.encode() for chunk in chunks]
        self._short.add(_Text(b" ".join(encoded), list(map(len, encoded))), places)
        self._used = end

    def _encode(self, groups: Sequence[Sequence[str]]) -> Sequence[Any]:
        """What the library makes of chunks with a blank between, group by group."""
        return encode_with(self._tokenizer.encode_batch, [" ".join(group) for group in groups])

    def _takes_blanks(self, encoding: Any) -> bool:
        """Whether an added token that takes in blanks is among the tokens."""
        return not self._greedy.isdisjoint(encoding.ids)


def reader_of(tokenizer: Tokenizer, remember: bool = True) -> Reader:
    """The faster reader where the tokenizer, and who asks, allow it."""
    if remember and RememberedChunks.fits(tokenizer):
        return RememberedChunks(tokenizer)
    return WholeTexts(tokenizer)
