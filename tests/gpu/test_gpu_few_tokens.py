"""The chain of kernels for few tokens: against fp32, repeated, replayed, and beside infinities."""

from __future__ import annotations

import pytest
import torch
from stacks import VOCABULARY, random_stack

from ft_handler import load_library
from ft_handler.native import twins

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

# Hidden size, heads and intermediate size with measured plans, and two that an estimate plans.
SIZES = [(768, 12, 3072), (384, 12, 1536), (256, 4, 1024), (192, 6, 320)]
LENGTHS = [[32], [64], [1], [5, 0, 17, 9], [40, 24], [1] * 33, [96], [50, 1, 30]]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_library()


def inputs(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids from 1 up and where sequences end."""
    g = torch.Generator(device=DEVICE).manual_seed(5)
    ids = torch.randint(1, VOCABULARY, (sum(lengths),), device=DEVICE, generator=g)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    return ids, ends


def encode(
    parameters: list[torch.Tensor], ids: torch.Tensor, ends: torch.Tensor, heads: int
) -> torch.Tensor:
    """The op's hidden states; `max_seqlen` is the capacity."""
    op = torch.ops.fastertransformer.encoder
    return op(ids, ids % 2, None, ends, len(ids), *parameters, heads, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_against_fp32_and_again(
    size: tuple[int, int, int], lengths: list[int], dtype: torch.dtype
) -> None:
    parameters, (ids, ends) = random_stack(size, dtype), inputs(lengths)
    out = encode(parameters, ids, ends, size[1])
    exact = twins.encoder(
        *(ids, ids % 2, None, ends, len(ids)), *[p.float() for p in parameters], size[1], 1e-12
    )
    bound = 3e-3 if dtype == torch.float16 else 2.4e-2
    assert (out.float() - exact).norm() / exact.norm() < bound
    for _ in range(20):
        assert torch.equal(encode(parameters, ids, ends, size[1]), out)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_finite_stays_in_its_sequence(size: tuple[int, int, int], value: float) -> None:
    parameters, (ids, ends) = random_stack(size, torch.float16), inputs([9, 14, 23])
    healthy = encode(parameters, ids, ends, size[1])
    parameters[0][0] = value  # the word that no sequence has yet
    ids[12] = 0
    beside = encode(parameters, ids, ends, size[1])
    assert not beside[9:23].isfinite().any()
    assert torch.equal(beside[:9], healthy[:9])
    assert torch.equal(beside[23:], healthy[23:])


def test_a_graph_follows_new_lengths() -> None:
    size = SIZES[0]
    parameters = random_stack(size, torch.float16)
    ids, _ = inputs([32])
    ends = torch.tensor([0, 32, 32, 32], dtype=torch.int32, device=DEVICE)
    encode(parameters, ids, ends, size[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = encode(parameters, ids, ends, size[1])
    for lengths in ([32, 0, 0], [3, 11, 7], [10, 10, 12], [1, 0, 0]):
        ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        used = sum(lengths)
        assert torch.equal(out[:used], encode(parameters, ids, ends, size[1])[:used])
        exact = twins.encoder(
            *(ids[:used], ids[:used] % 2, None, ends, used),
            *[p.float() for p in parameters],
            size[1],
            1e-12,
        )
        assert (out[:used].float() - exact).norm() / exact.norm() < 3e-3
