"""The CPU engine alone: outputs of packed batches, threads, and what warming up leaves behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from model_support import VOCABULARY, fused, info_of, random_bert
from tiny import MODES, QUESTION_ANSWERING

from ft_handler.engine.base import synthetic_batch
from ft_handler.engine.cpu import CpuEngine
from ft_handler.engine.select import engine_for
from ft_handler.model.bundle import LoadedModel
from ft_handler.types import PackedBatch


def engine_of(mode):
    bert = random_bert(mode, num_labels=3 if mode != QUESTION_ANSWERING else 2)
    return bert, CpuEngine(LoadedModel(fused(bert, mode), info_of(bert, mode)))


def batch_of(rng, lengths):
    shape = synthetic_batch(lengths, VOCABULARY)
    ids = rng.integers(1, VOCABULARY, shape.total)
    types = rng.integers(0, 2, shape.total)
    return PackedBatch(ids, types, shape.cu_seqlens, shape.max_seqlen)


def by_transformers(bert, batch):
    """Logits of every sequence alone: `[columns]`, or `[columns, tokens]` for answers."""
    out = []
    for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        with torch.no_grad():
            parts = bert(
                input_ids=torch.from_numpy(batch.input_ids[None, begin:end]),
                token_type_ids=torch.from_numpy(batch.token_type_ids[None, begin:end]),
                return_dict=False,
            )
        out.append(np.stack([part[0].numpy() for part in parts]))
    return out


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_of_every_sequence_in_order(mode):
    bert, engine = engine_of(mode)
    batch = batch_of(np.random.default_rng(1), [1, 7, 33, 2, 64])
    wanted = by_transformers(bert, batch)
    for warm in (False, True):
        if warm:
            assert engine.warm_up()["seconds"] > 0
        found = engine.launch(batch).result()
        assert found.dtype == np.float32
        if mode == QUESTION_ANSWERING:
            assert found.shape == (2, batch.total)
            np.testing.assert_allclose(found, np.concatenate(wanted, axis=1), atol=1e-4)
        else:
            assert found.shape == (5, 3)
            np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_sequences_has_no_outputs(mode):
    _, engine = engine_of(mode)
    shape = (2, 0) if mode == QUESTION_ANSWERING else (0, 3)
    assert engine.launch(synthetic_batch([], VOCABULARY)).result().shape == shape


def test_ids_out_of_range_are_an_error_of_that_batch_alone():
    _, engine = engine_of(QUESTION_ANSWERING)
    good = batch_of(np.random.default_rng(2), [5, 3])
    before = engine.launch(good).result()
    bad = PackedBatch(good.input_ids + VOCABULARY, good.token_type_ids, good.cu_seqlens, 5)
    with pytest.raises((RuntimeError, torch.jit.Error), match="input_ids"):
        engine.launch(bad)
    np.testing.assert_array_equal(engine.launch(good).result(), before)


def test_threads_share_an_engine():
    _, engine = engine_of(QUESTION_ANSWERING)
    engine.warm_up()
    rng = np.random.default_rng(3)
    batches = [batch_of(rng, rng.integers(1, 60, 6).tolist()) for _ in range(12)]
    wanted = [engine.launch(batch).result() for batch in batches]
    different = []

    def work(number):
        for at in np.random.default_rng(number).permutation(len(batches)):
            found = engine.launch(batches[at]).result()
            if not np.array_equal(found, wanted[at]):
                different.append(at)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert different == []


def test_a_cpu_gets_this_engine():
    bert = random_bert(QUESTION_ANSWERING)
    model = LoadedModel(fused(bert, QUESTION_ANSWERING), info_of(bert, QUESTION_ANSWERING))
    engine = engine_for(model, torch.device("cpu"))
    assert isinstance(engine, CpuEngine)
    assert not engine.overlaps
