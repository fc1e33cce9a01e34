"""Packing and bucketing: hand-checkable examples, then properties."""

from __future__ import annotations

import numpy as np
from fakes import items_of
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.request.batching import (
    Sequences,
    default_buckets,
    finite,
    flatten,
    outputs_of,
    pack,
    plan_buckets,
    restore,
)
from ft_handler.types import Encoding


def encoding(sequences, splits):
    (item,) = items_of([None])
    return Encoding(item, [np.array(s, np.int64) for s in sequences], splits, False)


ARRIVALS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
EDGES = st.lists(st.integers(1, 60), max_size=6, unique=True).map(sorted)


def test_flatten_and_pack_by_eye():
    sequences = flatten(
        [
            encoding([[1, 2, 3]], [3]),
            encoding([[4, 5], [6, 7, 8, 9]], [1, 2]),
        ]
    )
    assert sequences.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert sequences.token_type_ids.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 1]
    assert sequences.lengths.tolist() == [3, 2, 4]
    assert sequences.owners.tolist() == [0, 1, 1]
    batch = pack(sequences, np.array([2, 0]))
    assert batch.input_ids.tolist() == [6, 7, 8, 9, 1, 2, 3]
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.max_seqlen == 4


def test_the_types_are_what_the_encoder_takes():
    batch = pack(flatten([encoding([[7, 8]], [2])]), np.array([0]))
    assert (batch.input_ids.dtype, batch.token_type_ids.dtype) == (np.int64, np.int64)
    assert batch.cu_seqlens.dtype == np.int32
    assert type(batch.max_seqlen) is int


def test_plans_by_eye():
    lengths = np.array([5, 30, 7, 8, 31])

    def plan(edges, budget):
        return [m.tolist() for m in plan_buckets(lengths, edges, budget)]

    assert plan((), 1000) == [[0, 1, 2, 3, 4]]
    assert plan((64,), 1000) == [[0, 1, 2, 3, 4]]
    assert plan((8, 64), 1000) == [[0, 2, 3], [1, 4]]
    assert plan((8,), 1000) == [[0, 2, 3], [1, 4]]
    assert plan((8, 64), 13) == [[0, 2], [3], [1], [4]]
    assert plan_buckets(np.array([], np.int64), (8,), 10) == []


def test_the_default_is_one_bucket():
    assert plan_buckets(np.array([1, 512]), default_buckets(512), 16384)[0].tolist() == [0, 1]


@given(ARRIVALS, EDGES, st.integers(1, 300))
def test_every_sequence_runs_once_in_a_bucket_within_the_budget(lengths, edges, budget):
    array = np.array(lengths)
    plan = plan_buckets(array, edges, budget)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    for members in plan:
        assert len(members)
        assert array[members].sum() <= budget or len(members) == 1
        assert len({int(np.searchsorted(edges, n)) for n in array[members]}) == 1


@given(ARRIVALS, EDGES, st.integers(1, 300), st.booleans())
def test_results_come_back_in_arrival_order(lengths, edges, budget, with_pairs):
    rng = np.random.default_rng(3)
    encodings = [
        encoding([rng.integers(0, 1000, n)], [int(rng.integers(0, n + 1)) if with_pairs else n])
        for n in lengths
    ]
    sequences = flatten(encodings)
    rows, tokens = [], []
    for members in plan_buckets(sequences.lengths, edges, budget):
        batch = pack(sequences, members)
        assert batch.cu_seqlens[-1] == batch.total
        assert batch.max_seqlen == max(len(encodings[i].sequences[0]) for i in members)
        for i, a, b in zip(members, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            (ids,), (split,) = encodings[i].sequences, encodings[i].splits
            assert batch.input_ids[a:b].tolist() == ids.tolist()
            assert batch.token_type_ids[a:b].tolist() == [0] * split + [1] * (len(ids) - split)
        sums = np.add.reduceat(batch.input_ids, batch.cu_seqlens[:-1]).astype(np.float32)
        rows.append((members, sums[:, None]))
        tokens.append((members, np.stack([batch.input_ids, -batch.input_ids]).astype(np.float32)))
    assert restore(rows, sequences, per_token=False)[:, 0].tolist() == [
        float(sum(e.sequences[0])) for e in encodings
    ]
    first, second = restore(tokens, sequences, per_token=True).tolist()
    assert first == sequences.input_ids.tolist()
    assert second == (-sequences.input_ids).tolist()


def three():
    """Sequences of one, two and one token."""
    return flatten([encoding([[7]], [1]), encoding([[8, 8]], [2]), encoding([[9]], [1])])


def test_buckets_that_failed_leave_zeros():
    members = np.array([1])
    rows = restore([(members, np.ones((1, 2), np.float32))], three(), per_token=False)
    assert rows.tolist() == [[0, 0], [1, 1], [0, 0]]
    columns = restore([(members, np.ones((1, 2), np.float32))], three(), per_token=True)
    assert columns.tolist() == [[0, 1, 1, 0]]


def test_what_is_not_finite_is_found_by_sequence():
    rows = np.array([[0, 1], [np.inf, 0], [0, 0]], np.float32)
    assert finite(rows, three(), per_token=False).tolist() == [True, False, True]
    columns = np.array([[0, 0, np.nan, 0], [1, 1, 1, 1]], np.float32)
    assert finite(columns, three(), per_token=True).tolist() == [True, False, True]


def test_outputs_of_chosen_sequences():
    chosen = np.array([True, False, True])
    rows = outputs_of(np.array([[0], [1], [2]], np.float32), three(), chosen, per_token=False)
    assert (rows.values.tolist(), rows.lengths.tolist()) == ([[0], [2]], [1, 1])
    columns = outputs_of(np.array([[0, 1, 2, 3]], np.float32), three(), chosen, per_token=True)
    assert (columns.values.tolist(), columns.lengths.tolist()) == ([[0, 3]], [1, 1])


def test_packing_is_lossless_for_many_windows():
    sequences = Sequences(
        np.arange(6), np.zeros(6, np.int64), np.array([1, 2, 3]), np.array([0, 0, 0])
    )
    assert pack(sequences, np.array([0, 1, 2])).input_ids is sequences.input_ids
    assert pack(sequences, np.array([1])).input_ids.tolist() == [1, 2]
