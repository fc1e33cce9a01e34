"""The head of embeddings against its definition, sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ft_handler.model.heads import VectorHead
from ft_handler.native.library import load_library
from ft_handler.tasks.embeddings import pooled_by_torch
from ft_handler.tasks.sentence_modules import Dense

POOLINGS = ("cls", "mean", "max", "last")
WIDTH = 96


def scripted(pooling: str, dense: Dense | None = None) -> Any:
    load_library()
    weights = () if dense is None else (dense.weight, dense.bias)
    curved = dense is not None and dense.curve == "Tanh"
    return torch.jit.script(VectorHead(*weights, pooling=pooling, curved=curved))


def batch_of(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed hidden states and `cu_seqlens`."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randn(int(ends[-1]), WIDTH).to(dtype), ends


def defined(pooling: Any, dense: Dense | None, hidden: Tensor) -> Tensor:
    """The vector of one sequence, in fp32."""
    mask = torch.ones(1, len(hidden), dtype=torch.long)
    return pooled_by_torch(pooling, dense, (hidden.float()[None],), mask)[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 113, 511], [2] * 64])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_its_definition(pooling: str, lengths: list[int], dtype: torch.dtype) -> None:
    hidden, ends = batch_of(lengths, dtype)
    found = scripted(pooling)(hidden, ends)
    assert found.dtype == torch.float32
    assert found.shape == (len(lengths), WIDTH)
    for row, part in zip(found, hidden.split(lengths), strict=True):
        wanted = defined(pooling, None, part)
        assert torch.allclose(row, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_depends_on_its_sequence_alone(pooling: str) -> None:
    lengths = [5, 33, 1, 70]
    hidden, ends = batch_of(lengths, torch.float32)
    head = scripted(pooling)
    together = head(hidden, ends)
    for row, part in zip(together, hidden.split(lengths), strict=True):
        alone = head(part, torch.tensor([0, len(part)], dtype=torch.int32))[0]
        assert torch.equal(alone, row)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_padded_definition_does_not_see_pads(pooling: Any) -> None:
    lengths = [3, 8, 1]
    hidden, ends = batch_of(lengths, torch.float32)
    padded = torch.full((3, 8, WIDTH), 1e6)
    for i, part in enumerate(hidden.split(lengths)):
        padded[i, : len(part)] = part
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    (wanted,) = pooled_by_torch(pooling, None, (padded,), mask)
    assert torch.allclose(scripted(pooling)(hidden, ends), wanted, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_empty_sequences_at_the_end_change_nothing(pooling: str) -> None:
    """As they fill up a CUDA graph's batch, behind the last token."""
    hidden, ends = batch_of([4, 9], torch.float32)
    head = scripted(pooling)
    wanted = head(hidden, ends)
    filled = torch.cat([ends, ends[-1:].repeat(3)])
    found = head(hidden, filled)
    assert found.shape == (5, WIDTH)
    assert torch.equal(found[:2], wanted)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("curve", ["Tanh", "Identity"])
def test_a_dense_layer_follows(curve: str) -> None:
    dense = Dense("2_Dense", curve, torch.randn(10, WIDTH) / 10, torch.randn(10))
    hidden, ends = batch_of([4, 9], torch.float32)
    found = scripted("mean", dense)(hidden, ends)
    for row, part in zip(found, hidden.split([4, 9]), strict=True):
        assert torch.allclose(row, defined("mean", dense, part), atol=1e-6)
    (padded,) = scripted("mean", dense).padded(found, ends, 2, 9)
    assert torch.equal(padded, found)
