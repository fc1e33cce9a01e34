"""Request to Encoding: token ids, truncation, and the windows of long contexts.

Works on the `tokenizers` library alone. A whole batch is tokenized in one call; texts are cut
here, after tokenization, because only then is it known whether anything was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Encoding as TokenizersEncoding
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.normalizers import BertNormalizer

from ft_handler.errors import ConfigError, RequestError, UnusableRequest
from ft_handler.types import (
    Encoding,
    ModelInput,
    QuestionInput,
    QuestionParams,
    QuestionWindows,
    TextInput,
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


class _Template:
    """How many special tokens stand before, between and after the texts of a pair."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        probe = tokenizer.encode("a", "a")
        sequence = probe.sequence_ids
        if 0 not in sequence or 1 not in sequence:
            raise ConfigError("the tokenizer does not build pairs: check its post_processor")
        first, second = sequence.index(0), sequence.index(1)
        first_end = len(sequence) - sequence[::-1].index(0)
        second_end = len(sequence) - sequence[::-1].index(1)
        if first > second:
            raise ConfigError("the tokenizer puts the second text first: this is not supported")
        ids, types = probe.ids, probe.type_ids
        self.before = ids[:first]
        self.between = ids[first_end:second]
        self.after = ids[second_end:]
        self.has_types = 1 in types
        # The separator that follows the first text belongs to it: token type 0.
        self.first_type = types.index(1) - first_end if self.has_types else 0
        single = tokenizer.encode("a")
        mask = single.special_tokens_mask
        self.single_before = mask.index(0)
        self.single_after = mask[::-1].index(0)

    @property
    def pair_specials(self) -> int:
        """Special tokens of a pair."""
        return len(self.before) + len(self.between) + len(self.after)


class TextEncoder:
    """Tokenizes texts and pairs for classification."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._template = _Template(tokenizer)
        if max_length <= self._template.pair_specials:
            raise ConfigError(f"setting 'max_length' ({max_length}) leaves no room for text")

    def encode(self, inputs: Sequence[ModelInput]) -> list[Encoding | RequestError]:
        """One Encoding an input, or the error (422) that takes it out of the flow."""
        texts = [i for i in inputs if isinstance(i, TextInput)]
        encoded = self._tokenizer.encode_batch_fast(
            [i.text if i.text_pair is None else (i.text, i.text_pair) for i in texts]
        )
        limit = self._max_length
        out: list[Encoding | RequestError] = []
        for text, tokens in zip(texts, encoded, strict=True):
            ids = tokens.ids
            count = len(ids)
            if count > limit and not text.params.truncation:
                out.append(
                    UnusableRequest(
                        f"the input has {count} tokens, the limit is {limit} and truncation is off"
                    )
                )
            elif text.text_pair is None:
                if count > limit:
                    ids = self._cut(ids)
                out.append(Encoding([ids], [len(ids)], count > limit))
            else:
                out.append(self._pair(tokens))
        return out

    def _cut(self, ids: list[int]) -> list[int]:
        after = self._template.single_after
        return ids[: self._max_length - after] + ids[len(ids) - after :]

    def _pair(self, tokens: TokenizersEncoding) -> Encoding:
        template, ids = self._template, tokens.ids
        sequence = tokens.sequence_ids
        first, second = sequence.count(0), sequence.count(1)
        room = self._max_length - template.pair_specials
        begin, gap = len(template.before), len(template.between)
        keep_first, keep_second = longest_first(first, second, room)
        truncated = keep_first + keep_second < first + second
        if truncated:
            middle = begin + first + gap
            ids = (
                ids[: begin + keep_first]
                + template.between
                + ids[middle : middle + keep_second]
                + template.after
            )
        split = begin + keep_first + template.first_type if template.has_types else len(ids)
        return Encoding([ids], [split], truncated)


class QuestionEncoder:
    """Tokenizes questions with their contexts, in overlapping windows where they are long."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._template = _Template(tokenizer)

    def encode(self, inputs: Sequence[ModelInput]) -> list[Encoding | RequestError]:
        """One Encoding an input, or the error (422) that takes it out of the flow."""
        questions = [i for i in inputs if isinstance(i, QuestionInput)]
        texts = [q.question for q in questions]
        texts += [q.context for q in questions]
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        out: list[Encoding | RequestError] = []
        for at, question in enumerate(questions):
            try:
                out.append(self._windows(question, encoded[at], encoded[at + len(questions)]))
            except RequestError as error:
                out.append(error)
        return out

    def _windows(
        self, item: QuestionInput, question: TokenizersEncoding, context: TokenizersEncoding
    ) -> Encoding:
        params, template = item.params, self._template
        question_ids, context_ids = question.ids, context.ids
        cut = len(question_ids) > params.max_question_len
        head = template.before + question_ids[: params.max_question_len] + template.between
        overlap = params.doc_stride
        if overlap is None:
            overlap = min(params.max_seq_len // 2, 128)
        room = self._room(params, len(head), overlap)
        if not context_ids:
            raise UnusableRequest("'context' has no word the model could read")
        spans = window_spans(len(context_ids), room, overlap)
        tail = template.after
        sequences = [head + context_ids[begin:end] + tail for begin, end in spans]
        split = len(head)
        if template.has_types:
            split += template.first_type - len(template.between)
            splits = [split] * len(spans)
        else:
            splits = [len(s) for s in sequences]
        windows = QuestionWindows(item.context, context, len(head), spans)
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
