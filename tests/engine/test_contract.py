"""The fake engine of the tests keeps the promises of the real one, and makes no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from tiny import MODES, QUESTION_ANSWERING

from ft_handler.engine.base import Engine, synthetic_batch
from ft_handler.engine.cpu import CpuEngine
from ft_handler.model.bundle import load_model
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.types import PackedBatch

LENGTHS = [5, 1, 17, 5]


@pytest.fixture(scope="module")
def engines(
    make_tiny_bert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[str, str], Engine]:
    """The fake and the real engine of each mode."""
    found: dict[tuple[str, str], Engine] = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp("traced")
        trace(TraceOptions(mode=mode, model_name_or_path=str(make_tiny_bert(mode)), output=folder))
        model = load_model(folder / "traced_model.pt", torch.device("cpu"), folder)
        found["real", mode] = CpuEngine(model)
        found["fake", mode] = FakeEngine(mode)
    return found


def changed(batch: PackedBatch, **changes: np.ndarray) -> PackedBatch:
    """A batch with other arrays."""
    values = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return PackedBatch(**{**values, **changes})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["real", "fake"])
def test_engines_keep_the_same_contract(
    engines: Mapping[tuple[str, str], Engine], kind: str, mode: str
) -> None:
    engine = engines[kind, mode]
    assert engine.overlaps is False
    assert all(isinstance(value, float) for value in engine.warm_up().values())
    asks = mode == QUESTION_ANSWERING
    batch = synthetic_batch(LENGTHS, 40)
    out = engine.launch(batch).result()
    assert out.dtype == np.float32
    assert out.shape == ((2, sum(LENGTHS)) if asks else (len(LENGTHS), 3))
    # Each sequence by itself gives the same, and may be written to.
    for at, (begin, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
        alone = PackedBatch(
            batch.input_ids[begin:end],
            batch.token_type_ids[begin:end],
            np.array([0, end - begin], np.int32),
            int(end - begin),
        )
        own = engine.launch(alone).result()
        assert own == pytest.approx(out[:, begin:end] if asks else out[at : at + 1], abs=1e-4)
        own[:] = 0
    # Ids, places and types all count.
    reversed_ids = changed(batch, input_ids=batch.input_ids[::-1].copy())
    typed = changed(batch, token_type_ids=np.ones_like(batch.token_type_ids))
    for other in (reversed_ids, typed):
        assert np.abs(engine.launch(other).result() - out).max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["real", "fake"])
@pytest.mark.parametrize(("name", "value"), [("token_type_ids", 2), ("token_type_ids", -1),
                                             ("input_ids", -1)])  # fmt: skip
def test_engines_refuse_what_no_model_can_read(
    engines: Mapping[tuple[str, str], Engine], kind: str, mode: str, name: str, value: int
) -> None:
    batch = synthetic_batch(LENGTHS, 40)
    wrong = getattr(batch, name).copy()
    wrong[-1] = value
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        engines[kind, mode].launch(changed(batch, **{name: wrong})).result()
