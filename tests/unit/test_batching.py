"""Packing and bucketing: hand-checkable examples, then properties."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.request.batching import (
    Sequences,
    default_buckets,
    flatten,
    pack,
    plan_buckets,
    restore_rows,
    restore_tokens,
)
from ft_handler.types import Encoding

ARRIVALS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
EDGES = st.lists(st.integers(1, 60), max_size=6, unique=True).map(sorted)


def test_flatten_and_pack_by_eye():
    sequences = flatten(
        [
            Encoding([[1, 2, 3]], [3], False),
            Encoding([[4, 5], [6, 7, 8, 9]], [1, 2], False),
        ]
    )
    assert sequences.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert sequences.token_type_ids.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 1]
    assert sequences.lengths.tolist() == [3, 2, 4]
    batch = pack(sequences, np.array([2, 0]))
    assert batch.input_ids.tolist() == [6, 7, 8, 9, 1, 2, 3]
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.max_seqlen == 4


def test_the_types_are_what_the_encoder_takes():
    batch = pack(flatten([Encoding([[7, 8]], [2], False)]), np.array([0]))
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
        Encoding(
            [rng.integers(0, 1000, n).tolist()],
            [int(rng.integers(0, n + 1)) if with_pairs else n],
            False,
        )
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
            assert batch.input_ids[a:b].tolist() == ids
            assert batch.token_type_ids[a:b].tolist() == [0] * split + [1] * (len(ids) - split)
        sums = np.add.reduceat(batch.input_ids, batch.cu_seqlens[:-1]).astype(np.float32)
        rows.append((members, sums[:, None]))
        tokens.append((members, batch.input_ids.astype(np.float32)))
    assert restore_rows(rows, len(lengths))[:, 0].tolist() == [
        float(sum(e.sequences[0])) for e in encodings
    ]
    assert restore_tokens(tokens, sequences.lengths).tolist() == sequences.input_ids.tolist()


def test_buckets_that_failed_leave_zeros():
    lengths = np.array([1, 2, 1])
    members = np.array([1])
    assert restore_rows([(members, np.ones((1, 2), np.float32))], 3).tolist() == [
        [0, 0],
        [1, 1],
        [0, 0],
    ]
    assert restore_tokens([(members, np.ones(2, np.float32))], lengths).tolist() == [0, 1, 1, 0]


def test_packing_is_lossless_for_many_windows():
    sequences = Sequences(np.arange(6), np.zeros(6, np.int64), np.array([1, 2, 3]))
    assert pack(sequences, np.array([0, 1, 2])).input_ids is sequences.input_ids
    assert pack(sequences, np.array([1])).input_ids.tolist() == [1, 2]
