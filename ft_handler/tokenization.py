"""Request to Encoding: token ids, truncation, and the windows of long contexts.

Works on the `tokenizers` library alone. A whole batch is tokenized in one call; texts are cut
here, after tokenization, because only then is it known whether anything was lost.

BERT's words never reach over a blank, so what stands between two blanks always gives the same
tokens. Remembering them takes a 25-token sentence from about 50 microseconds to about 5.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

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
    TokenMap,
)


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


class WholeTexts:
    """Token ids and origins straight from the library, for any tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, in one call of the library."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encoded]

    def located(self, texts: Sequence[str]) -> tuple[list[list[int]], list[TokenMap]]:
        """Token ids of each text, and where its tokens came from."""
        return self.ids(texts), [_WholeMap(self._tokenizer, text) for text in texts]


class _WholeMap:
    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._found: _Spans | None = None

    def span(self, token: int, whole_word: bool) -> tuple[int, int]:
        if self._found is None:
            self._found = _spans(self._tokenizer, self._text)
        return self._found[token][whole_word]


_Spans = list[tuple[tuple[int, int], tuple[int, int]]]


def _spans(tokenizer: Tokenizer, text: str) -> _Spans:
    """Per token its own characters, and those of its word (its own where there is no word)."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    words: dict[int | None, tuple[int, int]] = {}
    for word, (begin, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        first = words.get(word, (begin, end))
        words[word] = (min(first[0], begin), max(first[1], end))
    return [
        (own, own if word is None else words[word])
        for word, own in zip(encoding.word_ids, encoding.offsets, strict=True)
    ]


_LONGEST_CHUNK = 48
_GROUP = 64


class RememberedChunks:
    """Token ids of texts made of chunks between blanks, each tokenized once.

    capacity  chunks kept beside the vocabulary's own words; when it is reached the memory starts
              afresh
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
        words = [w for w in tokenizer.get_vocab() if w.isalnum() and len(w) <= _LONGEST_CHUNK]
        self._words = self._read(words)
        self._capacity = capacity + len(words)
        self._forget()

    def _forget(self) -> None:
        self._ids = dict(self._words)
        self._origins: dict[str, _Spans] = {}

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

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        join = chain.from_iterable
        return [list(join(pieces)) for _, pieces in self._pieces(texts)]

    def located(self, texts: Sequence[str]) -> tuple[list[list[int]], list[TokenMap]]:
        """Token ids of each text, and where its tokens came from."""
        found = self._pieces(texts)
        ids = [list(chain.from_iterable(pieces)) for _, pieces in found]
        return ids, [_ChunkMap(self, chunks, pieces) for chunks, pieces in found]

    def _pieces(self, texts: Sequence[str]) -> list[tuple[list[str], list[list[int]]]]:
        """Each text's chunks, and the token ids of each chunk."""
        if self._lower:
            texts = [t.lower() if t.isascii() and "[" not in t else t for t in texts]
        chunked = [text.split(" ") for text in texts]
        known = self._ids.__getitem__
        try:
            return [(chunks, list(map(known, chunks))) for chunks in chunked]
        except KeyError:
            passing = self._learn({*chain.from_iterable(chunked)})
        known = self._ids.__getitem__
        pieces = [(chunks, list(map(known, chunks))) for chunks in chunked]
        for chunk in passing:
            del self._ids[chunk]
        return pieces

    def _learn(self, chunks: set[str]) -> list[str]:
        """Tokenize what is not remembered, in one call; returns what should be forgotten again."""
        new = [chunk for chunk in chunks if chunk not in self._ids]
        if len(self._ids) + len(new) > self._capacity:
            self._forget()
            new = [chunk for chunk in chunks if chunk not in self._ids]
        self._ids.update(self._read(new))
        # Long chunks are rarely words, and would let a client fill the memory.
        return [chunk for chunk in new if len(chunk) > _LONGEST_CHUNK]

    def _read(self, chunks: Sequence[str]) -> dict[str, list[int]]:
        """Token ids of each chunk; many go into one text, because a call costs more than a word."""
        groups = [chunks[i : i + _GROUP] for i in range(0, len(chunks), _GROUP)]
        texts = [" ".join(group) for group in groups]
        found: dict[str, list[int]] = {}
        for group, encoding in zip(
            groups, self._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            # The first token of every chunk is the first that begins at the chunk or after it.
            begins = [begin for begin, _ in encoding.offsets]
            ids, at, first = encoding.ids, 0, 0
            for chunk in group:
                at += len(chunk) + 1
                last = bisect_left(begins, at, first)
                found[chunk] = ids[first:last]
                first = last
        return found

    def origins(self, chunk: str) -> _Spans:
        """Where the tokens of one chunk came from."""
        spans = self._origins.get(chunk)
        if spans is None:
            if len(self._words.get(chunk, ())) == 1:
                whole = (0, len(chunk))
                return [(whole, whole)]
            spans = _spans(self._tokenizer, chunk)
            if len(chunk) <= _LONGEST_CHUNK:
                self._origins[chunk] = spans
        return spans


class _ChunkMap:
    def __init__(
        self, memory: RememberedChunks, chunks: list[str], pieces: list[list[int]]
    ) -> None:
        self._memory, self._chunks, self._pieces = memory, chunks, pieces
        self._ends: list[int] = []
        self._widths: list[int] = []

    def span(self, token: int, whole_word: bool) -> tuple[int, int]:
        if not self._ends:
            self._ends = list(accumulate(map(len, self._pieces)))
            self._widths = list(accumulate(map(len, self._chunks)))
        at = bisect_right(self._ends, token)
        chunk = self._chunks[at]
        # One blank before every chunk but the first.
        begin = self._widths[at] - len(chunk) + at
        first = self._ends[at - 1] if at else 0
        inner = self._memory.origins(chunk)[token - first][whole_word]
        return begin + inner[0], begin + inner[1]


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
        self.before = pair.ids[:first]
        self.between = pair.ids[first + order.count(0) : second]
        self.after = pair.ids[second + order.count(1) :]
        alone = single.sequence_ids
        self.single_before = single.ids[: alone.index(0)]
        self.single_after = single.ids[alone.index(0) + alone.count(0) :]
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
            sequence = [*before, *ids, *after]
            out.append(Encoding([sequence], [len(sequence)], count > room))
        return out

    def _too_long(self, count: int) -> RequestError:
        return UnusableRequest(
            f"the input has {count} tokens, the limit is {self._max_length} and truncation is off"
        )

    def _pair(
        self, text: TextInput, first: list[int], second: list[int]
    ) -> Encoding | RequestError:
        template = self._template
        count = len(first) + len(second)
        room = self._max_length - template.pair_specials
        if count > room:
            if not text.params.truncation:
                return self._too_long(count + template.pair_specials)
            keep_first, keep_second = longest_first(len(first), len(second), room)
            first, second = first[:keep_first], second[:keep_second]
        sequence = [*template.before, *first, *template.between, *second, *template.after]
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
        asked = self._reader.ids([q.question for q in questions])
        contexts, maps = self._reader.located([q.context for q in questions])
        out: list[Encoding | RequestError] = []
        for item, question, context, origin in zip(questions, asked, contexts, maps, strict=True):
            try:
                out.append(self._windows(item, question, context, origin))
            except RequestError as error:
                out.append(error)
        return out

    def _windows(
        self, item: QuestionInput, question: list[int], context: list[int], origin: TokenMap
    ) -> Encoding:
        params, template = item.params, self._template
        cut = len(question) > params.max_question_len
        question = question[: params.max_question_len]
        head, tail = [*template.before, *question, *template.between], template.after
        overlap = params.doc_stride
        if overlap is None:
            overlap = min(params.max_seq_len // 2, 128)
        room = self._room(params, len(head), overlap)
        if not context:
            raise UnusableRequest("'context' has no word the model could read")
        spans = window_spans(len(context), room, overlap)
        sequences = [[*head, *context[begin:end], *tail] for begin, end in spans]
        splits = [template.split(len(question), len(s)) for s in sequences]
        windows = QuestionWindows(item.context, origin, len(head), spans)
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
