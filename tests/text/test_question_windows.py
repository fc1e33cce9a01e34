"""Windows of questions and contexts by every kind of tokenizer, against the library's own pairs."""

from __future__ import annotations

import pytest
from fakes import items_of, runner_of
from hypothesis import given, settings
from hypothesis import strategies as st
from readings import KINDS
from tokenizers import Tokenizer

from ft_handler.tasks import question_answering as qa
from ft_handler.tasks.question_answering import QuestionEncoding, QuestionInput
from ft_handler.text.readers import Origins

SIZE, OVERLAP = 40, 6
WORDS = (
    "the", "bridge", "Engineer", "don't", "1914", "caf\u00e9", "cafe\u0301", "\U0001f600",
    "\U0001f469\u200d\U0001f680", "\u6771\u4eac", "\ufb01lm", "\u05e9\u05dc\u05d5\u05dd", ".",
    "(x)", "\u00a0", "\n", "\u3000", "\t", "\u0301", "</s>", "<mask>",
)  # fmt: skip
TEXTS = st.tuples(
    st.sampled_from(("", " ", "  ", "\n")),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=60),
    st.sampled_from((" ", " ", "  ", "")),
).map(lambda parts: parts[0] + parts[2].join(parts[1]))


def windows(tokenizer: Tokenizer, question: str, context: str) -> QuestionEncoding | None:
    """What question answering makes of a question; None where it is refused."""
    params = qa.Parameters(max_seq_len=SIZE, doc_stride=OVERLAP, max_question_len=12)
    items = items_of([QuestionInput(question, context, params)])
    made: list[QuestionEncoding] = runner_of("question_answering", tokenizer, 128).encode(items)
    return made[0] if made else None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(question=st.sampled_from(("who", " who?", "The \u6771\u4eac")), context=TEXTS)
def test_windows_and_offsets_are_the_librarys(kind: str, question: str, context: str) -> None:
    tokenizer = KINDS[kind]()
    encoding = windows(tokenizer, question, context)
    if encoding is None:
        assert not tokenizer.encode(context, add_special_tokens=False).ids
        return
    assert not encoding.truncated
    tokenizer.enable_truncation(SIZE, stride=OVERLAP, strategy="only_second")
    first = tokenizer.encode(question, context)
    theirs = [first, *first.overflowing]
    assert [ids.tolist() for ids in encoding.sequences] == [e.ids for e in theirs]
    for (begin, end), window in zip(encoding.spans, theirs, strict=True):
        at = encoding.first
        assert window.sequence_ids[at : at + end - begin] == [1] * (end - begin)
        ours: Origins = encoding.origins[begin:end]
        offsets = [tuple(row) for row in ours[:, :2].tolist()]
        wanted = window.offsets[at : at + end - begin]
        assert offsets[1:] == wanted[1:]
        # There a window's first blank counts as one that was added.
        there = wanted[0]
        if begin and "blank added" in kind and context[there[0] : offsets[0][0]] == " ":
            there = offsets[0]
        assert offsets[0] == there
        words = window.word_ids[at : at + end - begin]
        for number, (row, word) in enumerate(zip(ours.tolist(), words, strict=True)):
            cut = word in (words[0], words[-1]) and len(theirs) > 1
            if not cut:
                spelt = window.word_to_chars(word, 1)
                assert (row[2], row[3]) == spelt, (number, word)


@pytest.mark.parametrize("kind", [k for k in KINDS if "bytes" in k and "whole" not in k])
def test_answers_do_not_begin_with_a_blank(kind: str) -> None:
    context = "  The old bridge  was built\n by 1914 engineers \U0001f600 of caf\u00e9s " * 4
    encoding = windows(KINDS[kind](), "who", context)
    assert encoding is not None
    assert len(encoding.spans) > 1
    words = {context[begin:end] for _, _, begin, end in encoding.origins.tolist()}
    assert not [word for word in words if word != word.lstrip(" ") and word.strip()]
    assert {"The", "bridge", "engineers", "\U0001f600", "caf\u00e9s"} <= words
