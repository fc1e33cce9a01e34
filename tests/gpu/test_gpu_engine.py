"""The GPU engine: graphs against plain launches, threads, allocation, order."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ft_handler.engine.base import synthetic_batch
from ft_handler.engine.cpu import CpuEngine
from ft_handler.engine.cuda import CudaEngine
from ft_handler.engine.graphs import GraphPlan
from ft_handler.errors import OutOfDeviceMemory
from ft_handler.model.bundle import LoadedModel, load_model
from ft_handler.types import Floats, PackedBatch

pytestmark = pytest.mark.gpu
MODES = ("sequence_classification", "question_answering")
VOCABULARY = 100


@pytest.fixture(scope="module")
def traced(
    make_tiny_bert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """`traced(mode, data_type)` is the path of a traced tiny BERT, made once."""
    from ft_handler.prepare.options import TraceOptions
    from ft_handler.prepare.trace import trace

    made: dict[tuple[str, str], Path] = {}

    def path(mode: str, data_type: str) -> Path:
        if (mode, data_type) not in made:
            folder = tmp_path_factory.mktemp("traced")
            source = make_tiny_bert(mode, num_hidden_layers=3, initializer_range=0.1)
            options = TraceOptions(
                mode=mode, model_name_or_path=str(source), output=folder, data_type=data_type
            )
            trace(options)
            made[mode, data_type] = folder / "traced_model.pt"
        return made[mode, data_type]

    return path


def ragged(rng: np.random.Generator, count: int, longest: int = 128) -> PackedBatch:
    lengths = rng.integers(1, longest + 1, size=count).tolist()
    batch = synthetic_batch(lengths, VOCABULARY)
    ids = rng.integers(5, VOCABULARY, size=batch.total).astype(np.int64)
    types = rng.integers(0, 2, size=batch.total).astype(np.int64)
    return PackedBatch(ids, types, batch.cu_seqlens, batch.max_seqlen)


def engine(model: LoadedModel, graph_memory: int, **capacities: int) -> CudaEngine:
    capacities = {"max_tokens": 1024, "max_sequences": 16, **capacities}
    made = CudaEngine(model, torch.device("cuda", 0), graph_memory=graph_memory, **capacities)
    made.warm_up()
    return made


def apart(found: Floats, wanted: Floats) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max(initial=0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("data_type", ["fp32", "fp16", "bf16"])
def test_graphs_and_plain_launches_agree_with_the_cpu(traced, mode, data_type):
    path = traced(mode, data_type)
    reference = CpuEngine(load_model(traced(mode, "fp32"), "cpu"))
    graphs = engine(load_model(path, "cuda"), 1 << 28)
    plain = engine(load_model(path, "cuda"), 0)
    assert graphs._graphs
    assert not plain._graphs
    rng = np.random.default_rng(1)
    scale = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}[data_type]
    for count in (1, 2, 7, 16, 17, 40):  # 17 and 40 are over the graphs' capacity
        batch = ragged(rng, count)
        wanted = reference.launch(batch).result()
        spread = float(np.abs(wanted).max())
        from_graph = graphs.launch(batch).result()
        launched = plain.launch(batch).result()
        assert apart(launched, wanted) <= scale * spread
        assert apart(from_graph, launched) <= scale * spread


@pytest.mark.parametrize("mode", MODES)
def test_replays_with_other_lengths_leave_nothing_behind(traced, mode):
    graphs = engine(load_model(traced(mode, "fp16"), "cuda"), 1 << 28)
    rng = np.random.default_rng(2)
    small, large = ragged(rng, 3, 20), ragged(rng, 16, 60)
    before = graphs.launch(small).result()
    graphs.launch(large).result()
    assert apart(graphs.launch(small).result(), before) == 0


def test_batches_in_flight_keep_their_answers(traced):
    graphs = engine(load_model(traced("sequence_classification", "fp16"), "cuda"), 1 << 28)
    rng = np.random.default_rng(3)
    batches = [ragged(rng, int(n)) for n in rng.integers(1, 20, size=24)]
    alone = [graphs.launch(b).result() for b in batches]
    pending = [graphs.launch(b) for b in batches]
    for got, wanted in zip(pending, alone, strict=True):
        assert apart(got.result(), wanted) == 0


def test_two_engines_and_many_threads_on_one_gpu(traced):
    path = traced("question_answering", "fp16")
    engines = [engine(load_model(path, "cuda"), 1 << 27) for _ in range(2)]
    rng = np.random.default_rng(4)
    batches = [ragged(rng, int(n)) for n in rng.integers(1, 16, size=12)]
    wanted = [engines[0].launch(b).result() for b in batches]
    worst: list[float] = []

    def work(number: int) -> None:
        order = np.random.default_rng(number).permutation(len(batches))
        for at in [*order, *order]:
            worst.append(apart(engines[number % 2].launch(batches[at]).result(), wanted[at]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 6 * 2 * len(batches)
    assert max(worst) == 0


@pytest.mark.parametrize("graph_memory", [0, 1 << 27])
def test_memory_does_not_grow_over_ten_thousand_ragged_batches(traced, graph_memory):
    graphs = engine(load_model(traced("sequence_classification", "fp16"), "cuda"), graph_memory)
    rng = np.random.default_rng(5)
    batches = [ragged(rng, int(n), 60) for n in rng.integers(1, 17, size=200)]
    for batch in batches:
        graphs.launch(batch).result()
    reserved = torch.cuda.memory_reserved()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(50):
        for batch in batches:
            graphs.launch(batch).result()
    assert torch.cuda.memory_reserved() == reserved
    if "PYTEST_XDIST_WORKER" not in os.environ:  # what the driver says is of all processes
        assert torch.cuda.mem_get_info()[0] >= free - (1 << 21)


def test_a_launch_allocates_nothing_and_never_synchronises(traced):
    graphs = engine(load_model(traced("sequence_classification", "fp16"), "cuda"), 1 << 27)
    batch = ragged(np.random.default_rng(6), 8, 60)
    graphs.launch(batch).result()
    count = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        with warnings.catch_warnings():  # that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        pending = graphs.launch(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.result().shape == (8, 3)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == count


def test_the_budget_bounds_the_graphs_and_the_rest_still_runs(traced):
    model = load_model(traced("question_answering", "fp16"), "cuda")
    made = CudaEngine(model, torch.device("cuda", 0), max_tokens=1024, max_sequences=16)
    full = made.warm_up()
    assert full["graphs"] == len(list(GraphPlan.of(1024, 16, model.info.max_positions).shapes()))
    half = engine(model, int(full["graph_bytes"]) // 2)
    assert 0 < len(half._graphs) < full["graphs"]
    none = engine(model, 1)
    assert not none._graphs
    batch = ragged(np.random.default_rng(7), 5)
    wanted = made.launch(batch).result()
    spread = float(np.abs(wanted).max())
    for other in (half, none):  # a class's products may be tiled otherwise than the batch's own
        assert apart(other.launch(batch).result(), wanted) <= 2e-2 * spread


def test_out_of_memory_is_named_and_the_next_batch_runs(traced):
    plain = engine(load_model(traced("question_answering", "fp32"), "cuda"), 0)
    rng = np.random.default_rng(8)
    small, huge = ragged(rng, 4), ragged(rng, 4000)
    wanted = plain.launch(small).result()
    torch.cuda.empty_cache()
    most = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / most)
    try:
        with pytest.raises(OutOfDeviceMemory) as caught:
            plain.launch(huge).result()
        assert "CUDA" not in str(caught.value)
        assert apart(plain.launch(small).result(), wanted) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert plain.launch(huge).result().shape == (2, huge.total)


def test_empty_batches_and_ids_out_of_range(traced):
    graphs = engine(load_model(traced("sequence_classification", "fp16"), "cuda"), 0)
    assert graphs.launch(synthetic_batch([], VOCABULARY)).result().shape == (0, 3)
    batch = synthetic_batch([4], VOCABULARY)
    high = PackedBatch(batch.input_ids + 10**6, batch.token_type_ids, batch.cu_seqlens, 4)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        graphs.launch(high)
    types = PackedBatch(batch.input_ids, batch.token_type_ids + 2, batch.cu_seqlens, 4)
    with pytest.raises(ValueError, match="token_type_ids must lie in"):
        graphs.launch(types)
