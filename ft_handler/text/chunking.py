"""Where texts may be cut so that the parts read alone as they read together.

A part, a chunk, is a blank and what follows it, up to the next blank that begins one; a text's
first chunk has no blank before it, and a blank at a text's end nothing behind it. For every kind of
tokenizer that is known to keep to this there is a class here. What a class is not certain of it
says: a text with such a chunk is read whole.
"""

from __future__ import annotations

import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.normalizers import BertNormalizer, Normalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

_State = Mapping[str, Any]

#: Steps of a normalizer that look at no more than a character and the marks that belong to it.
_NEARSIGHTED = (
    "Precompiled", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Replace",
)  # fmt: skip
#: Patterns that match nothing where one blank stands between words.
_BLANK_RUNS = (" {2,}", r"\s{2,}|[\n\r\t]")
_POST_PROCESSORS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel")


class Chunking(ABC):
    """How one kind of tokenizer lets texts be cut.

    before      whether a blank begins a chunk only where no more whitespace stands before it
    behind      whether it does so only where no more whitespace follows it
    mark        what stands before a word's entry in the vocabulary
    apart       whether a text's first chunk reads otherwise than the same characters later on
    lower       whether ASCII may be lower-cased beforehand
    uncertain   ids of tokens that reach beyond their chunk
    """

    before: ClassVar[bool] = False
    behind: ClassVar[bool] = True
    mark: ClassVar[str] = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.apart = True
        self.lower = False
        self.uncertain = frozenset(tokenizer.get_added_tokens_decoder())

    def words(self, vocabulary: Iterable[str]) -> Iterable[str]:
        """Entries of the vocabulary that are whole words, without what marks them."""
        for entry in vocabulary:
            if entry.startswith(self.mark) and entry[len(self.mark) :].isalnum():
                yield entry[len(self.mark) :]

    @abstractmethod
    def certain(self, chunk: str, first: bool) -> bool:
        """Whether a chunk, without the blank before it, reads alike whatever stands around it.

        first  whether it is its text's first
        """


class BertWords(Chunking):
    """BERT's words never reach over a blank. Added tokens are found within a chunk, whatever stands
    around it; only those that take in blanks reach into what is around them."""

    behind = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        normalizer, tokens = tokenizer.normalizer, tokenizer.get_added_tokens_decoder()
        # Where the library puts a text's first offset back by a blank that was added to it.
        self.apart = any(
            step.get("trim_offsets") and step.get("add_prefix_space")
            for step in _steps(tokenizer.post_processor, "processors")
        )
        self.uncertain = frozenset(i for i, t in tokens.items() if t.lstrip or t.rstrip)
        # Lower-casing ASCII first makes more chunks equal; special tokens have a case.
        self.lower = bool(
            isinstance(normalizer, BertNormalizer)
            and normalizer.lowercase
            and all("[" in token.content for token in tokens.values())
        )

    def certain(self, chunk: str, first: bool) -> bool:
        return True

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        return (
            isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(tokenizer.model, WordPiece)
            and isinstance(tokenizer.normalizer, (BertNormalizer, type(None)))
        )


class NormalizedWords(Chunking):
    """Words after a normalizer: a chunk is certain if it has no whitespace at its ends, and is left
    none by the normalizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._normalizes = tokenizer.normalizer is not None
        self._core = _without_blank_steps(tokenizer.normalizer)
        self._beside = "" if self._core is None else self._core.normalize_str("a")

    def certain(self, chunk: str, first: bool) -> bool:
        if chunk != chunk.strip() or not chunk:
            return False
        if self._core is None:
            return True
        # A mark may join with the blank before it, and through it with a letter that joins ahead.
        if unicodedata.category(chunk[0]).startswith("M"):
            return False
        left, right = f"{self._beside} ", f" {self._beside}"
        found = self._core.normalize_str(f"a {chunk} a")
        word = found[len(left) : -len(right)]
        return found == f"{left}{word}{right}" and bool(word) and word == word.strip()


class ByteWords(NormalizedWords):
    """Byte-level BPE: a word takes in the blank before it.

    Whitespace of other kinds joins with the blanks before it, and with a text's last one. A blank
    before an added token stands alone or joins what precedes it.
    """

    mark = "Ġ"

    def words(self, vocabulary: Iterable[str]) -> Iterable[str]:
        # Others than ASCII are spelt in a script of bytes.
        return filter(str.isascii, super().words(vocabulary))

    def certain(self, chunk: str, first: bool) -> bool:
        if self._normalizes:
            return super().certain(chunk, first)
        ends = chunk[-1:] if first else chunk[0] + chunk[-1]
        return not any(c.isspace() and not c.isascii() for c in ends)

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        (splits, *more) = _steps(tokenizer.pre_tokenizer, "pretokenizers") or [{}]
        return (
            not more
            and splits.get("type") == "ByteLevel"
            and bool(splits.get("use_regex", True))
            and _plain_bpe(tokenizer)
            and _nearsighted(tokenizer.normalizer)
        )


class MarkedWords(NormalizedWords):
    """SentencePiece's words, by unigrams or BPE: a mark stands for the blank before each."""

    before = True
    mark = "▁"

    @staticmethod
    def fits(tokenizer: Tokenizer) -> bool:
        steps = _steps(tokenizer.pre_tokenizer, "pretokenizers")
        if steps and steps[0].get("type") == "WhitespaceSplit":
            steps = steps[1:]
        model = tokenizer.model
        return (
            len(steps) == 1
            and steps[0].get("type") == "Metaspace"
            and bool(steps[0].get("split", True))
            and (_plain_bpe(tokenizer) or (isinstance(model, Unigram) and not model.nbest_size))
            and _nearsighted(tokenizer.normalizer)
        )


def chunking_of(tokenizer: Tokenizer) -> Chunking | None:
    """How texts of a tokenizer may be cut; None where that is not certain."""
    sought = []
    for token in tokenizer.get_added_tokens_decoder().values():
        sought.append(token.content)
        if token.normalized and tokenizer.normalizer is not None:
            sought.append(tokenizer.normalizer.normalize_str(token.content))
    if not all(content and " " not in content for content in sought):
        return None
    if any(
        step.get("type") not in _POST_PROCESSORS
        for step in _steps(tokenizer.post_processor, "processors")
    ):
        return None
    kinds = (BertWords, ByteWords, MarkedWords)
    return next((kind(tokenizer) for kind in kinds if kind.fits(tokenizer)), None)


def _steps(part: Any, listed: str) -> list[_State]:
    """What a tokenizer's part does, one after the other, as its file describes it."""
    if part is None:
        return []
    try:
        state: _State = json.loads(part.__getstate__())
    except Exception:  # one that is written in Python has no description
        return [{}]
    return _flat(state, listed)


def _flat(state: _State, listed: str) -> list[_State]:
    if state.get("type") != "Sequence":
        return [state]
    return [step for inner in state[listed] for step in _flat(inner, listed)]


def _plain_bpe(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.model, BPE) and not tokenizer.model.dropout


def _touches_blanks_only(step: _State) -> bool:
    """Whether a step changes nothing where one blank stands between words."""
    pattern = step.get("pattern", {})
    return step.get("type") == "Strip" or (
        step.get("type") == "Replace" and pattern.get("Regex") in _BLANK_RUNS
    )


def _core(normalizer: Normalizer | None) -> list[_State]:
    """A normalizer's steps without those at its ends that only blanks concern."""
    steps = _steps(normalizer, "normalizers")
    while steps and _touches_blanks_only(steps[0]):
        steps = steps[1:]
    while steps and _touches_blanks_only(steps[-1]):
        steps = steps[:-1]
    return steps


def _nearsighted(normalizer: Normalizer | None) -> bool:
    """Whether a normalizer looks at no more than a character and its marks, blanks aside."""
    for step in _core(normalizer):
        if step.get("type") not in _NEARSIGHTED:
            return False
        if step["type"] == "Replace":
            literal = step.get("pattern", {}).get("String")
            if not literal or literal.split() != [literal]:
                return False
    return True


def _without_blank_steps(normalizer: Normalizer | None) -> Normalizer | None:
    """The normalizer of `_core`'s steps; None where nothing is left."""
    steps = _core(normalizer)
    if not steps:
        return None
    made = normalizers.Sequence([])
    made.__setstate__(json.dumps({"type": "Sequence", "normalizers": steps}).encode())
    return made
