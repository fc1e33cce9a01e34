"""On a CPU what a head answers for a sequence depends on that sequence alone, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ft_handler.model.heads import (
    GeluPooledHead,
    HeadModule,
    PooledHead,
    ReluPooledHead,
    SpanHead,
    TokenHead,
    VectorHead,
)
from ft_handler.native.library import load_library

WIDTH = 768
LENGTHS = (1, 7, 113, 30, 2, 2, 64, 511, 3, 9, 40)


def layer(outputs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, WIDTH) / WIDTH**0.5, torch.randn(outputs)


def heads() -> dict[str, HeadModule]:
    return {
        "tanh": PooledHead(*layer(WIDTH), *layer(2)),
        "relu": ReluPooledHead(*layer(WIDTH), *layer(3)),
        "gelu": GeluPooledHead(*layer(WIDTH), *layer(40)),
        "tokens": TokenHead(*layer(9)),
        "spans": SpanHead(*layer(2)),
        "vectors": VectorHead(*layer(384), pooling="mean", curved=True),
    }


def scripted(name: str) -> Any:
    load_library()
    return torch.jit.script(heads()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(heads()))
def test_what_shares_a_batch_changes_nothing(name: str, dtype: torch.dtype) -> None:
    head = scripted(name)
    hidden = torch.randn(sum(LENGTHS), WIDTH).to(dtype)
    parts = hidden.split(LENGTHS)

    def answers(chosen: list[int]) -> list[Tensor]:
        """What the head gives for these sequences together, one by one."""
        lengths = [LENGTHS[i] for i in chosen]
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        found = head(torch.cat([parts[i] for i in chosen]), ends)
        return list(found.split(lengths, dim=1) if name in ("tokens", "spans") else found)

    together = answers([*range(len(LENGTHS))])
    assert len({float(answer.flatten()[0]) for answer in together}) == len(LENGTHS)
    for size in (1, 2, 3, 5):
        for first in range(0, len(LENGTHS) - size, size):
            chosen = [*range(first, first + size)]
            for i, answer in zip(chosen, answers(chosen), strict=True):
                assert torch.equal(answer, together[i])
