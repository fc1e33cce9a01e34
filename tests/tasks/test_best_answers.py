"""Answers of the library's op are those of the arrays and Python's strings, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_handler.native import host
from ft_handler.tasks.answers import Wanted, Windows, answers_of_spans, best_answers

WORDS = st.sampled_from(
    [
        "a",
        "A",
        "b",
        "ab",
        "Ab",
        "É",
        "é",
        "İ",
        "i̇",
        "Σ",
        "σ",
        "ς",
        "ß",
        "ẞ",
        "\u212a",
        "k",
        "日",
        "x1",
    ]
)


@st.composite
def questions(draw):
    """Windows over contexts of a few words that are often alike, and logits."""
    contexts, origins, counts, spans, cls, begins = [], [], [], [], [], []
    total = 0
    for _ in range(draw(st.integers(1, 4))):
        words = draw(st.lists(WORDS, min_size=1, max_size=12))
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        starts = ends - [*map(len, words)]
        own = np.stack((starts, ends, starts, ends), axis=1)
        own[1::2, 2] = own[: len(own) // 2 * 2 : 2, 2]  # words of two tokens
        windows = [(0, len(words))]
        if draw(st.booleans()):
            middle = draw(st.integers(0, len(words) - 1))
            windows = [(0, middle + 1), (middle, len(words))]
        contexts.append(" ".join(words))
        origins.append(own.astype(np.int32))
        counts.append(len(windows))
        for begin, end in windows:
            spans.append((begin, end))
            cls.append(total)
            begins.append(total + 2)
            total += 3 + end - begin
    logits = draw(
        st.lists(st.integers(-6, 6), min_size=2 * total, max_size=2 * total).map(np.float32)
    )
    windows = Windows(
        contexts, origins, np.array(counts), np.array(spans), np.array(cls), np.array(begins)
    )
    return logits.reshape(2, total), windows


@settings(max_examples=200)
@given(questions(), st.sampled_from([1, 2, 5]), st.integers(1, 4), st.booleans())
def test_the_op_and_the_arrays_answer_alike(asked, top_k, longest, words):
    logits, windows = asked
    wanted = Wanted(top_k, longest, words)
    assert best_answers(logits, windows, wanted) == answers_of_spans(logits, windows, wanted)


def of_one(context, *tokens):
    """One window over a context whose tokens are words of their own."""
    origins = np.array([(a, b, a, b) for a, b in tokens], np.int32)
    ends = np.array([len(tokens)])
    return Windows(
        [context], [origins], np.array([1]), np.array([[0, ends[0]]]), ends - ends, ends - ends + 1
    )


def found(windows, top_k=3, **more):
    """How many answers the op finds of one-token spans, all equally likely."""
    tokens = len(windows.origins[0])
    logits = np.zeros((2, tokens + 2), np.float32)
    return host.best_answers(
        logits, windows.cls, windows.begins, windows.spans, windows.counts, windows.origins,
        windows.contexts, 1, more.get("wanted", 9), top_k, True, 0.0,
    )  # fmt: skip


def test_texts_that_differ_in_case_alone_are_one_answer():
    _, count, scores, begins, ends = found(of_one("Ab cd aB", (0, 2), (3, 5), (6, 8)))
    assert (count, begins, ends) == ([2], [0, 3], [2, 5])
    assert scores[0] == pytest.approx(2 * scores[1])


@pytest.mark.parametrize(
    ("context", "tokens", "count"),
    [
        ("é é", [(0, 1), (2, 3)], 1),  # the same letters need no case
        ("é è", [(0, 1), (2, 3)], -1),
        ("éa èb", [(0, 2), (3, 5)], 2),  # the second letters differ whatever the first ones are
        ("\u212a k", [(0, 1), (2, 3)], -1),  # the kelvin sign
        ("é ab", [(0, 1), (2, 4)], 2),
        ("İ ab", [(0, 1), (2, 4)], -1),  # two letters when it is small
        ("İ", [(0, 1)], 1),
    ],
)
def test_letters_beyond_ascii_are_left_to_whoever_knows_them(context, tokens, count):
    assert found(of_one(context, *tokens))[1] == [count]


def test_more_spans_than_are_compared_are_left_as_well():
    context = " ".join(f"{n:03}" for n in range(300))
    windows = of_one(context, *((4 * n, 4 * n + 3) for n in range(300)))
    assert found(windows, wanted=256)[1] == [3]
    assert found(windows, wanted=300)[1] == [-1]
    wanted = Wanted(150, 1, True)
    logits = np.zeros((2, 302), np.float32)
    assert best_answers(logits, windows, wanted) == answers_of_spans(logits, windows, wanted)


@pytest.mark.parametrize("own", [(0, 9), (-1, 1), (2, 1)])
def test_origins_outside_of_their_text_are_refused(own):
    with pytest.raises(RuntimeError, match="outside of text"):
        found(of_one("ab cd", own, (3, 5)))
