"""Truncation and windows against the tokenizers library's own, flags, and lower-casing."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
from fakes import items_of, runner_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from ft_handler.errors import ConfigError, UnusableRequest
from ft_handler.native import host
from ft_handler.tasks import question_answering as qa
from ft_handler.tasks import sequence_classification as classification
from ft_handler.tasks.question_answering import QuestionInput
from ft_handler.tasks.sequence_classification import TextInput
from ft_handler.tasks.windows import window_spans
from ft_handler.text.chunks import RememberedChunks, reader_of
from ft_handler.text.readers import WholeTexts
from ft_handler.text.template import longest_first
from ft_handler.text.tokenizer import load_tokenizer

CUT = classification.Parameters(truncation=True)
KEEP = classification.Parameters(truncation=False)
WORDS = ["the", "film", "was", "a", "good", "story", "unbuilt", "of", "an", "oldest", "bridge", "."]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="module")
def own(tiny_tokenizer) -> Tokenizer:
    """Another instance, to be told to truncate by itself."""
    return Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))


def question(text="who built it", context="an engineer built the bridge", **changes):
    values = {"max_seq_len": 32, "max_question_len": 8}
    return QuestionInput(text, context, qa.Parameters(**{**values, **changes}))


def texts_of(tokenizer, max_length, inputs):
    """What classification makes of inputs: an encoding, or the error in its place."""
    return outcomes(runner_of("sequence_classification", tokenizer, max_length), inputs)


def questions_of(tokenizer, max_length, inputs):
    """What question answering makes of inputs."""
    return outcomes(runner_of("question_answering", tokenizer, max_length), inputs)


def outcomes(runner, inputs):
    items = items_of(inputs)
    encodings = {id(e.item): e for e in runner.encode(items)}
    return [encodings.get(id(item), item.result) for item in items]


def rows(arrays):
    return [array.tolist() for array in arrays]


def test_a_text_by_eye(tokenizer):
    (encoding,) = texts_of(tokenizer, 128, [TextInput("A Good film!", None, CUT)])
    tokens = [tokenizer.id_to_token(i) for i in encoding.sequences[0]]
    assert tokens == ["[CLS]", "a", "good", "film", "!", "[SEP]"]
    assert encoding.splits == [6]
    assert encoding.truncated is False


def test_a_pair_by_eye(tokenizer):
    (encoding,) = texts_of(tokenizer, 128, [TextInput("a film", "the plot", CUT)])
    assert encoding.splits == [4]
    assert len(encoding.sequences[0]) == 7


@given(TEXTS, st.integers(4, 20))
def test_texts_are_cut_as_the_library_cuts_them(tokenizer, own, text, limit):
    own.enable_truncation(limit)
    (encoding,) = texts_of(tokenizer, limit, [TextInput(text, None, CUT)])
    assert rows(encoding.sequences) == [own.encode(text).ids]
    assert encoding.truncated == bool(own.encode(text).overflowing)


@given(TEXTS, TEXTS, st.integers(5, 24))
def test_pairs_are_cut_as_the_library_cuts_them(tokenizer, own, first, second, limit):
    own.enable_truncation(limit, strategy="longest_first")
    theirs = own.encode(first, second)
    (encoding,) = texts_of(tokenizer, limit, [TextInput(first, second, CUT)])
    assert rows(encoding.sequences) == [theirs.ids]
    ones = [0] * encoding.splits[0] + [1] * (len(theirs.ids) - encoding.splits[0])
    assert ones == theirs.type_ids
    assert encoding.truncated == (len(tokenizer.encode(first, second).ids) > limit)


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
@given(TEXTS, TEXTS | st.none(), st.integers(1, 30), st.integers(8, 24))
def test_strategies_and_lengths_are_the_librarys(
    tokenizer, own, strategy, first, second, asked, limit
):
    """A request's own `max_length` and strategy; what the library cannot cut is refused."""
    params = classification.Parameters(truncation=strategy, max_length=asked)
    (encoding,) = texts_of(tokenizer, limit, [TextInput(first, second, params)])
    specials = 2 if second is None else 3
    if min(asked, limit) <= specials:
        assert isinstance(encoding, UnusableRequest)
        return
    own.enable_truncation(min(asked, limit), strategy=strategy)
    try:
        theirs = own.encode(first, second)
    except Exception:  # the library raises bare Exception
        theirs = None
    if theirs is None:
        assert isinstance(encoding, UnusableRequest)
    else:
        assert rows(encoding.sequences) == [theirs.ids]
        assert encoding.splits == [theirs.type_ids.count(0)]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 60))
def test_longest_first_keeps_as_much_as_fits(first, second, room):
    a, b = longest_first(first, second, room)
    assert 0 <= a <= first
    assert 0 <= b <= second
    assert a + b == min(first + second, room)


def test_over_the_limit_without_truncation_is_refused_alone(tokenizer):
    long = "a film of the old city"
    inputs = [
        TextInput("a film", None, KEEP), TextInput(long, None, KEEP), TextInput("a", long, KEEP)
    ]  # fmt: skip
    out = texts_of(tokenizer, 6, inputs)
    assert out[0].truncated is False
    assert isinstance(out[1], UnusableRequest)
    assert isinstance(out[2], UnusableRequest)
    assert "8 tokens" in str(out[1])


def test_a_limit_without_room_is_a_configuration_error(tokenizer):
    with pytest.raises(ConfigError, match="max_length"):
        texts_of(tokenizer, 3, [TextInput("a", None, CUT)])


@given(TEXTS, st.integers(8, 24), st.integers(0, 3))
def test_windows_are_the_librarys_overflowing_parts(tokenizer, own, context, size, overlap):
    own.enable_truncation(size, stride=overlap, strategy="only_second")
    first = own.encode("who", context)
    theirs = [first, *first.overflowing]
    item = question("who", context, max_seq_len=size, doc_stride=overlap)
    (encoding,) = questions_of(tokenizer, 128, [item])
    assert rows(encoding.sequences) == [e.ids for e in theirs]
    for split, window, e in zip(encoding.splits, encoding.spans, theirs, strict=True):
        assert e.type_ids == [0] * split + [1] * (len(e.ids) - split)
        at = e.sequence_ids.index(1)
        assert at == encoding.first
        assert tuple(encoding.origins[window[0], :2]) == e.offsets[at]


@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 49))
def test_windows_cover_every_token(tokens, room, overlap):
    overlap = min(overlap, room - 1)
    spans = window_spans(tokens, room, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == tokens
    assert all(b - a <= room for a, b in spans)
    for (_, end), (begin, _) in pairwise(spans):
        assert end - begin == overlap


def test_long_questions_are_cut_and_flagged(tokenizer):
    long = " ".join(["who"] * 20)
    (encoding,) = questions_of(tokenizer, 128, [question(long)])
    assert encoding.truncated is True
    assert encoding.first == 1 + 8 + 1


def test_the_default_overlap_follows_the_window(tokenizer):
    context = " ".join(WORDS * 4)
    (encoding,) = questions_of(tokenizer, 128, [question("who", context, max_seq_len=24)])
    (_, end), (begin, _) = encoding.spans[:2]
    assert end - begin == 12


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_seq_len": 129}, "129.*128"),
        ({"max_seq_len": 4}, "max_seq_len.*at least 5"),
        ({"max_seq_len": 5}, "max_seq_len.*max_question_len"),
        ({"doc_stride": 30, "context": "the bridge " * 20}, "doc_stride"),
        ({"max_question_len": 40, "text": "who " * 40}, "max_question_len"),
        ({"context": "\u200b"}, "context"),
    ],
)
def test_windows_that_cannot_be_are_refused(tokenizer, changes, named):
    (error,) = questions_of(tokenizer, 128, [question(**changes)])
    assert isinstance(error, UnusableRequest)
    with pytest.raises(UnusableRequest, match=named):
        raise error


@given(st.integers(5, 128), st.integers(1, 130), st.integers(1, 300))
def test_defaults_answer_every_question_about_every_context(tokenizer, size, asked, told):
    """Whatever the window: the question is cut, windows advance and cover the context."""
    runner = runner_of("question_answering", tokenizer, 128, max_seq_len=size)
    item = QuestionInput(" ".join(["who"] * asked), " ".join(["film"] * told), runner.defaults)
    (encoding,) = outcomes(runner, [item])
    assert encoding.spans[0][0] == 0
    assert encoding.spans[-1][1] == told
    assert max(map(len, encoding.sequences)) <= size
    texts = size - 3
    kept = encoding.first - 2
    assert kept == asked if asked <= min(64, texts // 2) else 1 <= kept <= 64
    for (begin, end), (after, _) in pairwise(encoding.spans):
        assert after - begin >= (end - begin) / 4
        assert end - after == min(size // 2, 128, (end - begin) * 3 // 4)


@given(st.integers(5, 40), st.integers(1, 30), st.integers(1, 60), st.integers(0, 50))
def test_a_stride_is_refused_only_where_a_second_window_cannot_advance(
    tokenizer, size, asked, told, stride
):
    params = qa.Parameters(max_seq_len=size, doc_stride=stride)
    item = QuestionInput(" ".join(["who"] * asked), " ".join(["film"] * told), params)
    (found,) = questions_of(tokenizer, 128, [item])
    kept = min(asked, 64, max(1, (size - 3) * 3 // 4))
    room = size - 3 - kept
    if told > room and stride >= room:
        assert isinstance(found, UnusableRequest)
        assert "doc_stride" in str(found)
    else:
        assert found.spans == window_spans(told, room, min(stride, room - 1))


def test_a_window_without_room_for_both_is_a_configuration_error(tokenizer):
    for name in ("max_length", "max_seq_len"):
        with pytest.raises(ConfigError, match=f"{name}.*no room"):
            runner_of("question_answering", tokenizer, **{name: 4})


def test_offsets_are_characters_of_the_clients_text(tokenizer):
    context = "\U0001f600 Café au lait — the old bridge"
    (encoding,) = questions_of(tokenizer, 128, [question(context=context)])
    last = encoding.spans[-1][1] - 1
    begin, end = encoding.origins[last, 2:]
    assert context[begin:end] == "bridge"


ODD_CHARACTERS = st.sampled_from("aBé1 .,-\0'\u0301\u4e2d\u3000\n\tßΣ\u200b\U0001f600")
ODD_WORDS = st.sampled_from(
    [*WORDS, "The", "FILM.", "[SEP]", "[sep]", "[MASK]x", "", "don't", "a" * 101, "é" * 60]
)
ODD_TEXTS = (
    st.text(ODD_CHARACTERS | st.characters(exclude_categories=["Cs"]), max_size=40)
    | st.lists(ODD_WORDS).map(" ".join)
)  # fmt: skip


@given(st.lists(ODD_TEXTS, max_size=5), st.integers(1, 60))
def test_remembered_chunks_read_as_the_library_reads(tokenizer, texts, capacity):
    assert RememberedChunks.fits(tokenizer)
    memory, whole = RememberedChunks(tokenizer, capacity), WholeTexts(tokenizer)
    for n in (1, 2, 5, 5):
        assert rows(memory.ids(texts[:n])) == rows(whole.ids(texts[:n]))
        most = max(capacity, len({*" ".join(texts).split(" ")}))
        assert memory.chunks <= most
    for reader in (memory, whole):
        found, origins = reader.located(texts)
        assert rows(found) == rows(whole.ids(texts))
        for text, ids, origin in zip(texts, found, origins, strict=True):
            encoding = tokenizer.encode(text, add_special_tokens=False)
            for token in range(len(ids)):
                assert tuple(origin[token, :2]) == encoding.offsets[token]
                word = encoding.token_to_word(token)
                if word is not None:
                    assert tuple(origin[token, 2:]) == encoding.word_to_chars(word)


@given(st.lists(st.sampled_from([*WORDS, "\0", "bri\0dge", "\0the", "a\0 \0"]), min_size=1))
def test_null_characters_change_nothing_but_the_offsets(tokenizer, words):
    text = " ".join(words)
    without = text.replace("\0", "")
    for reader in (RememberedChunks(tokenizer), WholeTexts(tokenizer)):
        assert rows(reader.ids([text, without])) == rows(reader.ids([without, without]))
        (_, _), (found, plain) = reader.located([text, without])
        for (begin, end), (first, last) in zip(found[:, 2:], plain[:, 2:], strict=True):
            assert text[begin:end].replace("\0", "") == without[first:last]


def test_chunks_that_find_no_room_are_read_right(tokenizer, monkeypatch):
    """Every other chunk is kept; the rest are tokenized each time, and take no more memory."""
    real = host.ChunkMemory.add

    def crowded(memory, chunks, places):
        kept = np.zeros(len(chunks), np.bool_)
        kept[::2] = real(memory, chunks[::2], places[::2])
        return kept

    monkeypatch.setattr(host.ChunkMemory, "add", crowded)
    memory = RememberedChunks(tokenizer)
    texts = ["the film was good.", "unbuilt, the Bridge", "é a\0 a", " ".join(WORDS), "q" * 60]
    for _ in range(3):
        assert rows(memory.ids(texts)) == rows(WholeTexts(tokenizer).ids(texts))


def test_an_older_library_reads_every_text_afresh(tokenizer, monkeypatch):
    monkeypatch.setattr(host, "available", lambda: False)
    assert isinstance(reader_of(tokenizer), WholeTexts)
    with pytest.raises(ValueError, match="older"):
        RememberedChunks(tokenizer)


def test_chunks_that_differ_only_behind_a_key_are_told_apart(tokenizer):
    memory = RememberedChunks(tokenizer)
    texts = [
        "a" * n + tail
        for n in (13, 14, 15, 16, 45, 46, 47, 48)
        for tail in ("", "a", "b", "\0", "é")
    ]
    for _ in range(2):
        assert rows(memory.ids(texts)) == rows(WholeTexts(tokenizer).ids(texts))
        assert rows(memory.ids([" ".join(texts)])) == rows(
            WholeTexts(tokenizer).ids([" ".join(texts)])
        )


def test_cased_tokenizers_keep_the_case(tiny_tokenizer):
    cased = load_tokenizer(tiny_tokenizer, do_lower_case=False)
    texts = ["The film", "FILM"]
    assert rows(RememberedChunks(cased).ids(texts)) == rows(WholeTexts(cased).ids(texts))


def test_chunks_are_not_remembered_where_words_may_span_blanks(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = Metaspace()
    assert not RememberedChunks.fits(other)
    assert isinstance(reader_of(other), WholeTexts)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["old bridge"])
    assert not RememberedChunks.fits(other)


def test_truncation_and_padding_of_the_file_are_ignored(tiny_tokenizer, tmp_path):
    data = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    data["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert len(load_tokenizer(tmp_path).encode("a film of the city").ids) == 7


@pytest.mark.parametrize("lower", [True, False, None])
def test_lower_casing_follows_the_setting_then_the_file(tiny_tokenizer, lower):
    tokens = load_tokenizer(tiny_tokenizer, do_lower_case=lower).encode("Film").tokens
    assert ("film" in tokens) == (lower is not False)


def test_a_vocabulary_alone_is_enough(tiny_tokenizer, tmp_path, tokenizer):
    shutil.copy(tiny_tokenizer / "vocab.txt", tmp_path)
    legacy = load_tokenizer(tmp_path)
    for text in ("A film, sailed!", "[SEP] x", "naïve"):
        assert legacy.encode(text).ids == tokenizer.encode(text).ids
        assert legacy.encode(text, "a").type_ids == tokenizer.encode(text, "a").type_ids
    assert "film" not in load_tokenizer(tmp_path, do_lower_case=False).encode("Film").tokens


def test_missing_and_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"carries no tokenizer.*tokenizer\.json, .*vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_what_the_traced_file_carries_serves_where_nothing_lies_beside_it(
    tiny_tokenizer, tmp_path, tokenizer
):
    carried = (tiny_tokenizer / "tokenizer.json").read_text()
    for folder in (None, tmp_path):
        found = load_tokenizer(folder, carried=carried)
        assert found.encode("A film, sailed!").ids == tokenizer.encode("A film, sailed!").ids
    lower = load_tokenizer(None, do_lower_case=False, carried=carried)
    assert "film" not in lower.encode("Film").tokens
    cased = json.loads(carried)
    cased["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(cased))
    assert "film" not in load_tokenizer(tmp_path, carried=carried).encode("Film").tokens
