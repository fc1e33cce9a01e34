"""Remembered chunks of byte-level BPE and SentencePiece's words against the library itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import KINDS, SPECIALS, byte_level, check, mapped, marked
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from ft_handler.text.chunking import chunking_of
from ft_handler.text.chunks import RememberedChunks, reader_of
from ft_handler.text.readers import WholeTexts

#: Blanks of every kind, marks alone, parts of emoji, scripts, controls, line ends, what character
#: maps make blanks or nothing of, letters that join ahead, special tokens, long words.
PIECES = (
    "the", "film", "Bridge", "don't", "it's", "1914", "café", "cafe\u0301", "\u0301", "\u0308x",
    "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2009", "\u2028", "\u0085", "\x1c", "\u1680",
    "\u200b", "\u200d", "\u00ad", "\ufeff", "\0", "\x07", "\u00b4", "\ufb01lm", "\uff21\uff42",
    "\u00bd", "\u2460", "\u2026", "\ufdfa", "\u0600", "\u06dd", "\u1160", "\u1100\u1161", "\uff5e",
    "\U0001f600", "\U0001f469\u200d\U0001f680", "\U0001f3fb", "\u6771\u4eac", "\u304b\u306a\u3099",
    "\ud55c\uad6d", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627", "\u202e",
    "\u2581", "\u2581a", "\u0120", "\u0120b", "``", "''", "'", "\ufffd", "\U000e0041", *SPECIALS,
    " <mask>", "x" * 50, "\u4e2d" * 20, "-" * 60, "abcdefghijklmno", "abcdefghijklmnop", "a", ".",
    "!?", "(b)",
)  # fmt: skip
GAPS = st.sampled_from(("", "", " ", " ", " ", "  ", "   "))
TEXTS = (
    st.lists(st.tuples(st.sampled_from(PIECES), GAPS), max_size=10).map(
        lambda parts: "".join(piece + gap for piece, gap in parts)
    )
    | st.tuples(GAPS, st.sampled_from(PIECES)).map("".join)
    | st.text(st.characters(exclude_categories=["Cs"]) | st.just(" "), max_size=20)
)
BATCHES = st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def known() -> Callable[[str], tuple[Tokenizer, RememberedChunks]]:
    """Each kind's tokenizer and one memory for all examples, which meets them in their order."""
    made: dict[str, tuple[Tokenizer, RememberedChunks]] = {}

    def get(kind: str) -> tuple[Tokenizer, RememberedChunks]:
        if kind not in made:
            tokenizer = KINDS[kind]()
            made[kind] = tokenizer, RememberedChunks(tokenizer)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(batches=BATCHES, capacity=st.integers(1, 30))
def test_remembered_chunks_read_as_the_library_reads(
    known: Callable[[str], tuple[Tokenizer, RememberedChunks]],
    kind: str,
    batches: list[list[str]],
    capacity: int,
) -> None:
    tokenizer, memory = known(kind)
    check(WholeTexts(tokenizer), tokenizer, batches[0])
    small = RememberedChunks(tokenizer, capacity)
    for batch in [*batches, *batches[::-1]]:
        check(memory, tokenizer, batch)
        check(small, tokenizer, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_words_are_remembered_wherever_they_stand(
    known: Callable[[str], tuple[Tokenizer, RememberedChunks]],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, memory = known(kind)
    texts = [
        "The old bridge was built in 1914.",
        "built in the old city",
        "The caf\u00e9 \u6771\u4eac",
    ]
    check(memory, tokenizer, texts)
    batch = ["The 1914. caf\u00e9 in \u6771\u4eac", "built was bridge"]
    wanted = WholeTexts(tokenizer).ids(batch)

    def unasked(*_: Any) -> Any:
        raise AssertionError("the library was asked")

    monkeypatch.setattr("ft_handler.text.chunks.encode_with", unasked)
    monkeypatch.setattr("ft_handler.text.readers.encode_with", unasked)
    assert [ids.tolist() for ids in memory.ids(batch)] == [ids.tolist() for ids in wanted]


def with_part(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(tokenizer: Tokenizer, token: AddedToken) -> Tokenizer:
    tokenizer.add_tokens([token])
    return tokenizer


UNCERTAIN: dict[str, Callable[[], Tokenizer]] = {
    "bytes of another pattern": lambda: with_part(
        byte_level(),
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"),
                pre_tokenizers.ByteLevel(use_regex=False),
            ]
        ),
    ),
    "bytes without a pattern": lambda: with_part(
        byte_level(), pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False)
    ),
    "words with their blanks in one": lambda: with_part(
        marked(), pre_tokenizer=pre_tokenizers.Metaspace(split=False)
    ),
    "no pre-tokenizer": lambda: marked(normalizer=normalizers.Replace(" ", "\u2581")),
    "a blank put before": lambda: byte_level(normalizer=normalizers.Prepend("_")),
    "a pattern in the normalizer": lambda: marked(
        normalizer=mapped(normalizers.Replace(Regex("a b"), "c"))
    ),
    "blanks in the midst of the normalizer": lambda: marked(
        normalizer=normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Strip(), normalizers.NFC()]
        )
    ),
    "a token with a blank": lambda: with_token(byte_level(), AddedToken("old bridge")),
    "a token that the normalizer gives a blank": lambda: with_token(
        marked(normalizer=mapped()), AddedToken("a\u3000b", normalized=True)
    ),
    "merges left out at random": lambda: with_part(
        byte_level(), model=type(byte_level().model)(dropout=0.1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNCERTAIN)
def test_tokenizers_that_are_not_certain_to_fit_read_texts_whole(kind: str) -> None:
    tokenizer = UNCERTAIN[kind]()
    assert chunking_of(tokenizer) is None
    assert isinstance(reader_of(tokenizer), WholeTexts)
    with pytest.raises(ValueError, match="blanks"):
        RememberedChunks(tokenizer)


def test_what_decodes_is_of_no_concern() -> None:
    tokenizer = with_part(byte_level(), decoder=decoders.ByteLevel())
    assert isinstance(reader_of(tokenizer), RememberedChunks)
