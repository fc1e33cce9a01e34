"""The ops of the host's own work: reading chunks and choosing spans, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_handler.native import host
from ft_handler.native.library import load_library
from ft_handler.tasks.spans import best_spans, spans_of_arrays

load_library()

CUTS = host.Cuts(before=False, behind=False, apart=False, lower=True)
#: One token a row: its id, then its characters and its word's within the chunk.
TABLE = np.array([[7, 0, 2, 0, 2], [8, 0, 1, 0, 3], [9, 1, 3, 0, 3]], np.int32)
NONE = np.zeros(0, np.int64)


def place(row: int, tokens: int) -> int:
    return (row << host.PLACE_SHIFT) + tokens


def read(memory: host.ChunkMemory, *texts: bytes, given: Any = NONE) -> host.ReadChunks:
    ends = host.ends_of([*map(len, texts)], 1)
    return memory.read(TABLE, b" ".join(texts), ends, np.array(given, np.int64), CUTS, True)


def test_chunks_by_eye() -> None:
    memory = host.ChunkMemory(4)
    assert memory.add([b" ab", b" abc"], [place(0, 1), place(1, 2)]).tolist() == [True, True]
    found = read(memory, b"ab ABC", b"abc")
    assert found.ids.tolist() == [7, 8, 9, 8, 9]
    assert found.token_ends.tolist() == [3, 5]
    assert found.origins[1].tolist() == [3, 4, 3, 6]
    assert (found.whole, found.unknown) == ([], [])


def test_what_the_memory_lacks_is_told_and_taken_as_given() -> None:
    memory = host.ChunkMemory(4)
    memory.add([b" ab"], [place(0, 1)])
    found = read(memory, b"abc ab", b"", "é abc".encode())
    assert found.unknown == [b" abc", b" ", " é".encode(), b" abc"]
    assert len(found.ids) == 0
    found = read(
        memory, b"abc ab", b"", "é abc".encode(),
        given=[place(1, 2), place(0, 0), host.WHOLE, place(1, 2)],
    )  # fmt: skip
    assert found.ids.tolist() == [8, 9, 7, 8, 9]
    assert found.token_ends.tolist() == [3, 3, 5]
    assert found.whole == [2]
    assert found.origins[3].tolist() == [2, 3, 2, 5]  # counted in characters


def test_a_full_memory_keeps_no_more_and_loses_nothing() -> None:
    memory = host.ChunkMemory(8)
    chunks = [b" %d" % n for n in range(200)] + [b" " + b"q" * n for n in (47, 48)]
    kept = memory.add(chunks, [place(0, 1)] * len(chunks))
    assert 8 <= kept.sum() < 40
    assert not kept[-1]
    found = read(memory, *(chunk[1:] for chunk in chunks))
    assert found.unknown == [c for c, k in zip(chunks, kept.tolist(), strict=True) if not k]


def arguments(**changes: Any) -> list[Any]:
    """Of `read_chunks`: the memory's index and rows, table, text, ends, given and the flags."""
    named: dict[str, Any] = {
        "index": torch.zeros(8, dtype=torch.int32),
        "rows": torch.zeros(5, 8, dtype=torch.int64),
        "table": torch.from_numpy(TABLE.copy()),
        "text": torch.tensor([*b"ab c"], dtype=torch.uint8),
        "ends": torch.tensor([2, 4]),
        "given": torch.tensor([place(0, 1), place(1, 2)]),
    }
    return [*{**named, **changes}.values(), False, False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index": torch.zeros(6, dtype=torch.int32)}, "power of two"),
        ({"index": torch.zeros(8)}, "index must have dtype int32"),
        ({"rows": torch.zeros(5, 7, dtype=torch.int64)}, "rows has a shape"),
        ({"rows": torch.zeros(9, 8, dtype=torch.int64)}, "slots of index"),
        ({"table": torch.zeros(5, 3, dtype=torch.int32).T}, "contiguous"),
        ({"ends": torch.tensor([2, 5])}, "ends must rise"),
        ({"ends": torch.tensor([2, 2])}, "ends must rise"),
        ({"given": torch.tensor([place(0, 1), place(2, 2)])}, "outside of table"),
        ({"given": torch.tensor([place(0, 1), -1])}, "outside of table"),
    ],
)
def test_reading_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastertransformer.read_chunks(*arguments(**changes))


def test_a_memory_of_lies_is_not_followed() -> None:
    index = torch.full((8,), 1 << 30, dtype=torch.int32)
    found = torch.ops.fastertransformer.read_chunks(*arguments(index=index))
    assert len(found[5]) == 2  # both chunks are unknown


def spans_arguments(**changes: Any) -> list[Any]:
    named: dict[str, Any] = {
        "logits": torch.randn(2, 20),
        "cls": torch.tensor([0, 10]),
        "begins": torch.tensor([3, 12]),
        "counts": torch.tensor([7, 8]),
        "max_answer_len": 4,
        "wanted": 3,
    }
    return [*{**named, **changes}.values()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": torch.randn(20)}, "logits has a shape"),
        ({"counts": torch.tensor([7, 9])}, "outside of logits"),
        ({"counts": torch.tensor([7, 0])}, "outside of logits"),
        ({"cls": torch.tensor([0, -1])}, "outside of logits"),
        ({"wanted": 0}, "at least 1"),
    ],
)
def test_choosing_spans_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastertransformer.best_spans(*spans_arguments(**changes))


def answers_arguments(**changes: Any) -> list[Any]:
    """Of `best_answers`: two questions of three and four tokens, the second in two windows."""
    named: dict[str, Any] = {
        "logits": torch.randn(2, 16),
        "cls": torch.tensor([0, 5, 10]),
        "begins": torch.tensor([1, 6, 11]),
        "counts": torch.tensor([3, 3, 2]),
        "window_ends": torch.tensor([1, 3]),
        "firsts": torch.tensor([0, 0, 2]),
        "origins": torch.zeros(7, 4, dtype=torch.int32),
        "token_ends": torch.tensor([3, 7]),
        "text": torch.tensor([*b"ab c"], dtype=torch.uint8),
        "text_ends": torch.tensor([2, 4]),
    }
    numbers = {"max_answer_len": 2, "wanted": 3, "top_k": 1, "words": True, "least_share": 0.0}
    return [*{**named, **numbers, **changes}.values()]


def test_answers_come_of_arguments_that_fit() -> None:
    found = torch.ops.fastertransformer.best_answers(*answers_arguments())
    assert found[1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": torch.tensor([3, 3, 6])}, "outside of logits"),
        ({"cls": torch.tensor([0, 5])}, "cls has a shape"),
        ({"window_ends": torch.tensor([1, 2])}, "end with the last window"),
        ({"window_ends": torch.tensor([1, 4])}, "every question a window"),
        ({"window_ends": torch.tensor([0, 3])}, "every question a window"),
        ({"window_ends": torch.tensor([3])}, "window_ends has a shape"),
        ({"firsts": torch.tensor([1, 0, 2])}, "outside of its context"),
        ({"firsts": torch.tensor([0, -1, 2])}, "outside of its context"),
        ({"token_ends": torch.tensor([3, 8])}, "token_ends must rise"),
        ({"token_ends": torch.tensor([4, 7])}, "outside of its context"),
        ({"origins": torch.zeros(7, 3, dtype=torch.int32)}, "origins has a shape"),
        ({"text_ends": torch.tensor([2, 5])}, "ends must rise"),
        ({"wanted": 0}, "at least 1"),
        ({"top_k": 0}, "at least 1"),
        ({"max_answer_len": 0}, "at least 1"),
    ],
)
def test_choosing_answers_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastertransformer.best_answers(*answers_arguments(**changes))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 30))
def test_spans_are_those_of_the_arrays_and_a_windows_own(
    seed: int, longest: int, wanted: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 60, 5)
    cls = np.cumsum(counts + 3) - counts - 3
    logits = rng.normal(0, 4, (2, int((counts + 3).sum()))).astype(np.float32)
    found = best_spans(logits, cls, cls + 2, counts, longest, wanted)
    wanted_ones = spans_of_arrays(logits, cls, cls + 2, counts, longest, wanted)
    np.testing.assert_allclose(found[0], wanted_ones[0], rtol=2e-6)
    np.testing.assert_allclose(found[1], wanted_ones[1], rtol=2e-6)
    there = found[1] >= 0
    for mine, theirs in zip(found[2:], wanted_ones[2:], strict=True):
        assert (mine == theirs)[there].all()
    alone = best_spans(logits, cls[3:4], cls[3:4] + 2, counts[3:4], longest, wanted)
    width = alone[1].shape[1]
    for mine, one in zip(found, alone, strict=True):
        assert (mine[3] if mine.ndim == 1 else mine[3, :width]).tolist() == one[0].tolist()


@pytest.mark.parametrize("name", ["read_chunks", "remember_chunks", "best_spans"])
def test_opcheck(name: str) -> None:
    given = arguments() if name == "read_chunks" else spans_arguments()
    if name == "remember_chunks":
        text = torch.tensor([*b" ab c"], dtype=torch.uint8)
        given = [*arguments()[:2], text, torch.tensor([3, 5]), torch.tensor([1, 1])]
    op = getattr(torch.ops.fastertransformer, name).default
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(op, tuple(given), test_utils=checks)
