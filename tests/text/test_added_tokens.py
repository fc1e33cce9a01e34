"""Both readers against the library itself, over random tokenizers and orders of requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import check
from tokenizers import AddedToken, Tokenizer, normalizers

from ft_handler.native import host
from ft_handler.text.chunks import RememberedChunks, reader_of
from ft_handler.text.readers import Reader, WholeTexts, encode_with
from ft_handler.text.tokenizer import load_tokenizer

#: What added tokens are made of: brackets, words of the vocabulary and of none, parts of words,
#: marks that normalizers drop, blanks inside and at the ends, characters that get blanks around.
CONTENTS = (
    "[MASK]", "[mask]", "[CLS]", "<mask>", "film", "Film", "FILM", "fi", "lm", "old bridge",
    " film", "film ", "\u3000film", "a\tb", "\u4e2d", "a\u4e2d", "caf\u00e9", "cafe\u0301",
    "\u00df", ".", "[", "the", "[UNK]", "##s", "-", "film\u0301", "x\u00a0y",
)  # fmt: skip

added_tokens = st.builds(
    AddedToken,
    st.sampled_from(CONTENTS),
    single_word=st.booleans(),
    lstrip=st.booleans(),
    rstrip=st.booleans(),
    normalized=st.booleans(),
    special=st.booleans(),
)

some_normalizers = st.none() | st.builds(
    normalizers.BertNormalizer,
    clean_text=st.booleans(),
    handle_chinese_chars=st.booleans(),
    strip_accents=st.none() | st.booleans(),
    lowercase=st.booleans(),
)

PIECES = (
    *CONTENTS, "hello", "a", "good", "unbuilt", "Story", "?", "", "\t", "\n", "\u2009", "x" * 101,
    "\u00e9" * 30, "\u200d", "\U0001f600", "a" * 15, "b" * 49,
)  # fmt: skip
gaps = st.sampled_from(("", " ", " ", "  "))
texts = st.lists(st.tuples(st.sampled_from(PIECES), gaps), max_size=12).map(
    lambda parts: "".join(piece + gap for piece, gap in parts)
)
#: What clients send one after the other: batches of texts.
requests = st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=4)


def with_tokens(
    plain: Path, normalizer: normalizers.Normalizer | None, tokens: list[AddedToken]
) -> Tokenizer:
    """The tiny tokenizer with another normalizer and more tokens, as a file would have them."""
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    tokenizer.normalizer = normalizer
    tokenizer.add_tokens(tokens)
    return load_tokenizer(None, carried=tokenizer.to_str())


@settings(max_examples=100)
@given(normalizer=some_normalizers, tokens=st.lists(added_tokens, max_size=4), batches=requests)
def test_whatever_tokens_are_added_every_request_reads_as_if_it_came_alone(
    tiny_tokenizer: Path,
    normalizer: normalizers.Normalizer | None,
    tokens: list[AddedToken],
    batches: list[list[str]],
) -> None:
    tokenizer = with_tokens(tiny_tokenizer, normalizer, tokens)
    readers: list[Reader] = [WholeTexts(tokenizer), reader_of(tokenizer)]
    if RememberedChunks.fits(tokenizer):
        readers.append(RememberedChunks(tokenizer, capacity=3))
    for reader in readers:
        for batch in [*batches, *batches[::-1]]:
            check(reader, tokenizer, batch)


def sought(token: AddedToken) -> str:
    """What is looked for in texts: of two tokens with the same, the library takes any."""
    return str(normalizers.BertNormalizer(lowercase=True).normalize_str(token.content).strip())


@settings(max_examples=25)
@given(tokens=st.lists(added_tokens, max_size=4, unique_by=sought), batches=requests)
def test_both_readers_agree_with_auto_tokenizer(
    tiny_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tokens: list[AddedToken],
    batches: list[list[str]],
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("auto")
    tokenizer = with_tokens(tiny_tokenizer, normalizers.BertNormalizer(lowercase=True), tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    theirs = AutoTokenizer.from_pretrained(folder)
    for reader in (WholeTexts(tokenizer), reader_of(tokenizer)):
        for batch in batches:
            wanted = theirs(batch, add_special_tokens=False)["input_ids"]
            assert [ids.tolist() for ids in reader.ids(batch)] == wanted


def test_tokens_that_take_in_blanks_leave_the_texts_beside_them_remembered(
    tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_tokens(
        tiny_tokenizer,
        normalizers.BertNormalizer(lowercase=True),
        [AddedToken("<mask>", lstrip=True, special=True)],
    )
    reader = reader_of(tokenizer)
    assert isinstance(reader, RememberedChunks)
    batch = ["hello the <mask> film", "hello the film", "a <mask>"]
    check(reader, tokenizer, batch)
    read: list[list[str]] = []
    whole = WholeTexts.ids
    monkeypatch.setattr(
        WholeTexts, "ids", lambda self, texts: (read.append(list(texts)), whole(self, texts))[1]
    )
    reader.ids(batch)
    assert read == [[batch[0], batch[2]]]


@pytest.mark.parametrize("where", ["add", "read"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_request_that_fails_on_the_way_leaves_nothing_wrong_behind(
    tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, where: str, calls: int
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    reader = RememberedChunks(tokenizer)
    reader.ids(["unbuilt bridges"])
    real, left = getattr(host.ChunkMemory, where), [calls]

    def fragile(*arguments: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(host.ChunkMemory, where, fragile)
        for text in ("filming unwarm " + "q" * 60, "unsad rivers", "unold days"):
            try:
                reader.ids([text])
            except MemoryError:
                break
        else:
            pytest.fail("nothing was raised")
    check(reader, tokenizer, ["unsad films", "filming", "unwarm rivers", "unbuilt bridges"])
    check(reader, tokenizer, ["filming unwarm unsad " + "q" * 60])


def test_remembering_can_be_switched_off(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert isinstance(reader_of(tokenizer), RememberedChunks)
    assert isinstance(reader_of(tokenizer, remember=False), WholeTexts)


def test_a_panic_of_the_library_is_an_error_that_quotes_nothing() -> None:
    PanicException = type("PanicException", (BaseException,), {})

    def panics(texts: list[str], add_special_tokens: bool) -> list[object]:
        raise PanicException(texts[0])

    with pytest.raises(RuntimeError, match="panicked") as caught:
        encode_with(panics, ["a secret"])
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__

    def stops(texts: list[str], add_special_tokens: bool) -> list[object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_with(stops, ["a"])
