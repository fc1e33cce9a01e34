"""Whole encoders on the GPU: every activation and a relative bias, in graphs and out of them."""

from __future__ import annotations

import pytest
import torch
from stacks import VOCABULARY, random_stack, specification
from torch import Tensor

from ft_handler import load_library
from ft_handler.native import twins

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
# Hidden size, heads and intermediate size: head sizes of 64, 32, 128 and 48.
SIZES = [(768, 12, 3072), (384, 12, 1536), (256, 2, 1024), (192, 4, 320)]
LENGTHS = [[1], [7], [113], [511], [5, 0, 17, 9], [113, 7, 1, 511], [30] * 40]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_library()


def inputs(lengths: list[int], empty: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and where sequences end, `empty` ones among them."""
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), device="cuda")
    ends = torch.tensor([0, *lengths, *[0] * empty], device="cuda").cumsum(0).int()
    return ids, ends


def off(ours: Tensor, exact: Tensor) -> float:
    """The relative distance of the two, not a number where one is not."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("activation", "distance"),
    [
        ("gelu_tanh", 0),
        ("relu", 0),
        ("silu", 0),
        ("", 0),
        ("gelu", 8),
        ("gelu", 128),
        ("relu", 600),
    ],
)
def test_against_fp32(
    activation: str, distance: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    spec = specification(size, activation, distance)
    stack = random_stack(size, dtype, 512, distance)
    wide = [p.float() for p in stack]
    for lengths in LENGTHS:
        ids, ends = inputs(lengths)
        arguments = (ids, ids % 2, None, ends, max(lengths))
        out = torch.ops.fastertransformer.encode(*arguments, stack, spec, "")
        exact = twins.encode(*arguments, wide, spec)
        assert off(out, exact) < BOUNDS[dtype], lengths
        assert torch.equal(torch.ops.fastertransformer.encode(*arguments, stack, spec, ""), out)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("capacity", [64, 700])
def test_a_graph_follows_new_lengths(capacity: int, activation: str) -> None:
    size, distance = SIZES[0], 100
    stack = random_stack(size, torch.float16, 512, distance)
    spec = specification(size, activation, distance)
    ids, ends = inputs([capacity], empty=3)
    longest = min(capacity, 512)
    ends[1:] = ends[1:].clamp(max=longest)

    def encode() -> Tensor:
        op = torch.ops.fastertransformer.encode
        out: Tensor = op(ids, ids % 2, None, ends, longest, stack, spec, "")
        return out

    encode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = encode()
    for lengths in ([longest, 0, 0, 0], [3, 11, 7, 0], [1, 0, 0, 0], [15, 15, 15, 15]):
        ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        used = sum(lengths)
        assert torch.equal(out[:used], encode()[:used])
        exact = twins.encode(
            *(ids[:used], ids[:used] % 2, None, ends, longest), [p.float() for p in stack], spec
        )
        assert off(out[:used], exact) < BOUNDS[torch.float16]


def test_a_bias_that_does_not_fit_is_refused() -> None:
    size, distance = SIZES[1], 4
    stack = random_stack(size, torch.float16, distance=distance)
    spec = specification(size, distance=distance)
    ids, ends = inputs([9])
    fitting = stack[-1]
    for wrong in (fitting[:-1], fitting[:, 1:], fitting[0], fitting[None]):
        with pytest.raises(RuntimeError, match=r"attention\.relative_bias must"):
            torch.ops.fastertransformer.encode(
                *(ids, ids % 2, None, ends, 9), [*stack[:-1], wrong.contiguous()], spec, ""
            )
    with pytest.raises(RuntimeError, match=r"attention\.relative_bias must be contiguous"):
        torch.ops.fastertransformer.encode(
            *(ids, ids % 2, None, ends, 9), [*stack[:-1], fitting.float()], spec, ""
        )
