"""Windows over long texts."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from fakes import FakeEngine, pipeline_of
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.errors import RequestTooLarge
from ft_handler.request.work import Bounds
from ft_handler.tasks.windows import default_overlap, even_spans, hold_windows, window_spans
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_even_windows_cover_the_text_and_share_enough(tokens, room, data):
    overlap = data.draw(st.integers(0, room - 1))
    spans = even_spans(tokens, room, overlap)
    assert len(spans) == len(window_spans(tokens, room, overlap))
    assert (spans[0][0], spans[-1][1]) == (0, tokens)
    if len(spans) > 1:
        assert {end - begin for begin, end in spans} == {room}
    steps = [b[0] - a[0] for a, b in pairwise(spans)]
    assert all(1 <= step <= room - overlap for step in steps)
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize(("room", "overlap"), [(1, 0), (3, 0), (126, 31), (510, 127), (8190, 128)])
def test_the_default_overlap_leaves_a_way_forward(room, overlap):
    assert default_overlap(room) == overlap < room


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 10), st.integers(1, 900), st.data())
def test_windows_are_refused_only_where_they_are_too_much(tokens, room, beside, most, data):
    overlap = data.draw(st.integers(0, room - 1))
    spans = window_spans(tokens, room, overlap)
    asked = sum(end - begin + beside for begin, end in spans)
    try:
        hold_windows(tokens, room, overlap, beside, most, "stride")
    except RequestTooLarge:
        assert asked > most
    else:
        # One window more, at most, than is allowed.
        assert asked <= most + room + beside
    hold_windows(tokens, room, overlap, beside, None, "stride")


TEXT = "the old film " * 19_000  # nearly as long as a text may be


@pytest.mark.parametrize(
    ("mode", "asked", "name"),
    [
        (
            "question_answering",
            {"question": "who", "context": TEXT, "doc_stride": 123},
            "doc_stride",
        ),
        ("sequence_classification", {"text": TEXT, "long_texts": "mean", "stride": 125}, "stride"),
        (
            "sequence_classification",
            {"text": "a film", "text_pair": TEXT, "long_texts": "max", "stride": 122},
            "stride",
        ),
        ("token_classification", {"text": TEXT, "stride": 125}, "stride"),
    ],
)
def test_too_many_windows_are_refused_before_one_is_made(
    tiny_tokenizer, monkeypatch, mode, asked, name
):
    """One token further with every window: 57,000 windows of 128 tokens."""
    tokenizer = load_tokenizer(tiny_tokenizer)
    engine = FakeEngine(mode)
    pipeline = pipeline_of(tokenizer, engine, mode, bounds=Bounds(100_000, 1_000_000))
    home = f"ft_handler.tasks.{mode}."
    cut = "window_spans" if mode == "question_answering" else "even_spans"
    with monkeypatch.context() as patched:
        patched.setattr(home + cut, lambda *_: pytest.fail("windows were made"))
        (reply,) = pipeline.run([Incoming(asked)])[0]
    error = json.loads(reply.body)
    assert (reply.status, error["type"]) == (413, "RequestTooLarge")
    assert "over 100000 tokens" in error["message"]
    assert f"'{name}'" in error["message"]
    # The same text with windows that get on is answered.
    (reply,) = pipeline.run([Incoming({**asked, name: 10})])[0]
    assert reply.status == 200
    assert len(engine.batches) > 0


def test_explanations_hold_the_same_bound(tiny_tokenizer):
    mode = "question_answering"
    pipeline = pipeline_of(
        load_tokenizer(tiny_tokenizer),
        FakeEngine(mode),
        mode,
        bounds=Bounds(None, 5000),
        explains=True,
    )
    asked = {"question": "who", "context": "the old film " * 2000, "doc_stride": 100}
    (reply,) = pipeline.run([Incoming(asked)])[0]
    assert reply.status == 413
    assert "over 5000 tokens" in json.loads(reply.body)["message"]
