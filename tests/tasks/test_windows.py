"""Windows over long texts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.tasks.windows import default_overlap, even_spans, window_spans


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
