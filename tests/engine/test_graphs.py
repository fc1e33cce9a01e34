"""The shapes that get CUDA graphs, checked without a GPU."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.engine.base import synthetic_batch
from ft_handler.engine.graphs import GraphPlan

PLAN = GraphPlan.of(max_tokens=16384, max_sequences=64, max_length=512)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=64))
def test_every_batch_up_to_the_capacities_falls_into_a_planned_shape(lengths):
    total, batch, longest = sum(lengths), len(lengths), max(lengths)
    shape = PLAN.class_of(total, batch, longest)
    if total > PLAN.tokens[-1]:
        assert shape is None
        return
    tokens, sequences, length = shape
    assert total <= tokens
    assert batch <= sequences
    assert longest <= length
    assert shape in set(PLAN.shapes())


def test_classes_waste_at_most_a_seventh_of_the_rows_from_256_tokens_on():
    at = [t for t in PLAN.tokens if t >= 256]
    worst = max((b - a - 1) / b for a, b in pairwise(at))
    assert worst < 1 / 7
    assert all(t % 32 == 0 for t in PLAN.tokens)


def test_shapes_beyond_the_plan_have_no_class():
    assert PLAN.class_of(16385, 40, 512) is None
    assert PLAN.class_of(65, 65, 1) is None
    assert PLAN.class_of(513, 1, 513) is None


def test_no_planned_shape_is_impossible():
    for tokens, sequences, length in PLAN.shapes():
        smaller = [t for t in PLAN.tokens if t < tokens]
        assert sequences * length > (smaller[-1] if smaller else 0)


def test_synthetic_batches_are_well_formed():
    batch = synthetic_batch([3, 1, 5], vocab_size=4)
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 9]
    assert batch.max_seqlen == 5
    assert batch.total == 9
    assert batch.batch == 3
    assert batch.input_ids.max() < 4
    assert synthetic_batch([], 4).total == 0
    assert batch.cu_seqlens.dtype == np.int32
