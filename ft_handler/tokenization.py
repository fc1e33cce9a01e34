"""Request to Encoding: token ids, truncation, and the windows of long contexts.

Works on the `tokenizers` library alone. A whole batch is tokenized in one call; texts are cut
here, after tokenization, because only then is it known whether anything was lost.

BERT's words never reach over a blank, so what stands between two blanks always gives the same
tokens. Remembering them takes a 25-token sentence from about 50 microseconds to about 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from ft_handler.errors import ConfigError, RequestError, UnusableRequest
from ft_handler.types import (
    Encoding,
    ModelInput,
    QuestionInput,
    QuestionParams,
    QuestionWindows,
    TextInput,
)

#: [tokens] ids of a text's tokens, without special ones.
Ids: TypeAlias = NDArray[np.int64]
#: [tokens, 4] characters: begin and end of each token, then of its word; as in QuestionWindows.
Origins: TypeAlias = NDArray[np.int32]


def load_tokenizer(
    model_dir: Path, tokenizer_file: str = "tokenizer.json", do_lower_case: bool | None = None
) -> Tokenizer:
    """The tokenizer of an archive, without truncation or padding of its own.

    Reads `tokenizer_file`, else `vocab.txt` (lower-cased unless told otherwise). Raises
    ConfigError when neither is there, or when `do_lower_case` cannot be honoured.
    """
    path, vocab = model_dir / tokenizer_file, model_dir / "vocab.txt"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer: {error}") from None
    elif vocab.is_file():
        lower = do_lower_case is not False
        legacy = BertWordPieceTokenizer.from_file(str(vocab), lowercase=lower)
        tokenizer = Tokenizer.from_str(legacy.to_str())
    else:
        raise ConfigError(f"no tokenizer in the archive; tried {path} and {vocab}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if do_lower_case is not None:
        normalizer = tokenizer.normalizer
        if isinstance(normalizer, BertNormalizer):
            normalizer.lowercase = do_lower_case
            tokenizer.normalizer = normalizer
        elif do_lower_case != ("lowercase" in str(normalizer).lower()):
            raise ConfigError(
                f"setting 'do_lower_case' is {str(do_lower_case).lower()}, but {path.name} has "
                "another normalizer than BERT's: set it there"
            )
    return tokenizer


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of a pair stay when `room` are left: the longer text loses first.

    The shorter text keeps its length where it fits into half of the room; else both get half,
    the longer one the odd token.
    """
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    long = max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)


def window_spans(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Windows [begin, end) of at most `room` tokens; neighbours share `overlap` tokens."""
    spans = []
    for begin in range(0, max(tokens, 1), room - overlap):
        end = min(begin + room, tokens)
        spans.append((begin, end))
        if end == tokens:
            break
    return spans


def _origins(encodings: Sequence[Any]) -> Origins:
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
    runs, word_of = np.flatnonzero(begins), np.cumsum(begins) - 1
    words = np.minimum.reduceat(own[:, 0], runs), np.maximum.reduceat(own[:, 1], runs)
    return np.column_stack((own, words[0][word_of], words[1][word_of]))


def _split(rows: NDArray[Any], ends: NDArray[np.int64]) -> list[NDArray[Any]]:
    """`rows` cut into pieces that end at `ends`."""
    stops = ends.tolist()
    return [rows[begin:stop] for begin, stop in zip([0, *stops], stops, strict=False)]


class WholeTexts:
    """Token ids and origins straight from the library, for any tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without special tokens, in one call of the library."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int64) for e in encoded]

    def located(self, texts: Sequence[str]) -> tuple[list[Ids], list[Origins]]:
        """Token ids of each text, and where its tokens came from."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = [np.array(e.ids, np.int64) for e in encoded]
        return ids, _split(_origins(encoded), np.cumsum([len(e) for e in encoded]))


#: A chunk's place: the row of its first token in the table, shifted, and how many tokens it has.
_SHIFT = 32

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
    """

    def __init__(self, tokenizer: Tokenizer, capacity: int = 1 << 16) -> None:
        self._tokenizer = tokenizer
        normalizer = tokenizer.normalizer
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
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
        return (
            isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
            and isinstance(tokenizer.normalizer, (BertNormalizer, type(None)))
            and not any(
                " " in token.content for token in tokenizer.get_added_tokens_decoder().values()
            )
        )

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text, without special tokens."""
        return self._read(texts, located=False)[0]

    def located(self, texts: Sequence[str]) -> tuple[list[Ids], list[Origins]]:
        """Token ids of each text, and where its tokens came from."""
        return self._read(texts, located=True)

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
        ids = _split(found[:, 0].astype(np.int64), text_ends)
        origins: list[Origins] = []
        if located:
            found += np.repeat(text.characters(), counts)[:, None]
            origins = _split(found[:, 1:], text_ends)
        if passing:
            self._drop(passing)
        return ids, origins

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
        texts = [" ".join(group) for group in groups]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        origins = _origins(encodings)
        # Characters counted through all texts, a blank between two.
        sizes = np.array([len(text) + 1 for text in texts])
        origins += np.repeat(np.cumsum(sizes) - sizes, [len(e) for e in encodings])[:, None]
        widths = np.array([len(chunk) + 1 for chunk in chunks])
        begins = np.cumsum(widths) - widths
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
        self._places.update(zip(chunks, places.tolist(), strict=True))
        encoded = [chunk.encode() for chunk in chunks]
        self._short.add(_Text(b" ".join(encoded), list(map(len, encoded))), places)
        self._used = end


def reader_of(tokenizer: Tokenizer) -> WholeTexts | RememberedChunks:
    """The faster reader where the tokenizer allows it."""
    if RememberedChunks.fits(tokenizer):
        return RememberedChunks(tokenizer)
    return WholeTexts(tokenizer)


class _Template:
    """The special tokens before, between and after the texts, as the tokenizer places them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pair, single = tokenizer.encode("a", "a"), tokenizer.encode("a")
        order = pair.sequence_ids
        if 0 not in order or 1 not in order or order.index(0) > order.index(1):
            raise ConfigError(
                "the tokenizer does not build pairs in their order: check its post_processor"
            )
        first, second = order.index(0), order.index(1)
        ids = np.array(pair.ids, np.int64)
        self.before = ids[:first]
        self.between = ids[first + order.count(0) : second]
        self.after = ids[second + order.count(1) :]
        alone = single.sequence_ids
        ids = np.array(single.ids, np.int64)
        self.single_before = ids[: alone.index(0)]
        self.single_after = ids[alone.index(0) + alone.count(0) :]
        types = pair.type_ids
        # Tokens of type 0 after the first text: BERT's separator belongs to it.
        self.separators = types.index(1) - first - order.count(0) if 1 in types else None

    @property
    def pair_specials(self) -> int:
        """Special tokens of a pair."""
        return len(self.before) + len(self.between) + len(self.after)

    def split(self, first: int, total: int) -> int:
        """Leading tokens of type 0 in a pair of `total` tokens whose first text has `first`."""
        if self.separators is None:
            return total
        return len(self.before) + first + self.separators


class TextEncoder:
    """Tokenizes texts and pairs for classification."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._reader = reader_of(tokenizer)
        self._max_length = max_length
        self._template = _Template(tokenizer)
        if max_length <= self._template.pair_specials:
            raise ConfigError(f"setting 'max_length' ({max_length}) leaves no room for text")

    def encode(self, inputs: Sequence[ModelInput]) -> list[Encoding | RequestError]:
        """One Encoding an input, or the error (422) that takes it out of the flow."""
        texts = [i for i in inputs if isinstance(i, TextInput)]
        firsts = self._reader.ids([t.text for t in texts])
        pairs = [t.text_pair for t in texts if t.text_pair is not None]
        seconds = iter(self._reader.ids(pairs) if pairs else ())
        template = self._template
        before, after = template.single_before, template.single_after
        room = self._max_length - len(before) - len(after)
        out: list[Encoding | RequestError] = []
        for text, ids in zip(texts, firsts, strict=True):
            if text.text_pair is not None:
                out.append(self._pair(text, ids, next(seconds)))
                continue
            count = len(ids)
            if count > room:
                if not text.params.truncation:
                    out.append(self._too_long(count + len(before) + len(after)))
                    continue
                ids = ids[:room]
            sequence = np.concatenate((before, ids, after))
            out.append(Encoding([sequence], [len(sequence)], count > room))
        return out

    def _too_long(self, count: int) -> RequestError:
        return UnusableRequest(
            f"the input has {count} tokens, the limit is {self._max_length} and truncation is off"
        )

    def _pair(self, text: TextInput, first: Ids, second: Ids) -> Encoding | RequestError:
        template = self._template
        count = len(first) + len(second)
        room = self._max_length - template.pair_specials
        if count > room:
            if not text.params.truncation:
                return self._too_long(count + template.pair_specials)
            keep_first, keep_second = longest_first(len(first), len(second), room)
            first, second = first[:keep_first], second[:keep_second]
        sequence = np.concatenate(
            (template.before, first, template.between, second, template.after)
        )
        return Encoding([sequence], [template.split(len(first), len(sequence))], count > room)


class QuestionEncoder:
    """Tokenizes questions with their contexts, in overlapping windows where they are long."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._reader = reader_of(tokenizer)
        self._max_length = max_length
        self._template = _Template(tokenizer)

    def encode(self, inputs: Sequence[ModelInput]) -> list[Encoding | RequestError]:
        """One Encoding an input, or the error (422) that takes it out of the flow."""
        questions = [i for i in inputs if isinstance(i, QuestionInput)]
        # Both in one call: with few texts, how many calls there are is what costs.
        texts = [*(q.question for q in questions), *(q.context for q in questions)]
        ids, origins = self._reader.located(texts)
        count = len(questions)
        out: list[Encoding | RequestError] = []
        for parts in zip(questions, ids[:count], ids[count:], origins[count:], strict=True):
            try:
                out.append(self._windows(*parts))
            except RequestError as error:
                out.append(error)
        return out

    def _windows(
        self, item: QuestionInput, question: Ids, context: Ids, origins: Origins
    ) -> Encoding:
        params, template = item.params, self._template
        cut = len(question) > params.max_question_len
        question = question[: params.max_question_len]
        head = len(template.before) + len(question) + len(template.between)
        overlap = params.doc_stride
        if overlap is None:
            overlap = min(params.max_seq_len // 2, 128)
        room = self._room(params, head, overlap)
        if not len(context):
            raise UnusableRequest("'context' has no word the model could read")
        spans = window_spans(len(context), room, overlap)
        sequences = [
            np.concatenate(
                (template.before, question, template.between, context[begin:end], template.after)
            )
            for begin, end in spans
        ]
        splits = [template.split(len(question), len(s)) for s in sequences]
        windows = QuestionWindows(item.context, origins, head, spans)
        return Encoding(sequences, splits, cut, windows)

    def _room(self, params: QuestionParams, head: int, overlap: int) -> int:
        """Context tokens a window has; raises UnusableRequest when the settings leave none."""
        if params.max_seq_len > self._max_length:
            raise UnusableRequest(
                f"'max_seq_len' is {params.max_seq_len}, the model's limit is {self._max_length}"
            )
        room = params.max_seq_len - head - len(self._template.after)
        if room <= overlap:
            raise UnusableRequest(
                f"a window of {params.max_seq_len} tokens leaves {max(room, 0)} for the context, "
                f"but neighbouring windows share {overlap}: raise 'max_seq_len' or lower "
                "'doc_stride' or 'max_question_len'"
            )
        return room
