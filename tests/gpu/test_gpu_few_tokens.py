"""The chain of kernels for few tokens: against fp32, repeated, replayed, and beside infinities."""

from __future__ import annotations

import pytest
import torch
from stacks import LAYERS, VOCABULARY, random_stack, specification

from ft_handler import load_library
from ft_handler.native import twins

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

# Hidden size, heads and intermediate size with measured plans, and two that an estimate plans.
SIZES = [(768, 12, 3072), (384, 12, 1536), (256, 4, 1024), (192, 6, 320)]
# The last one is beyond what the chain takes.
LENGTHS = [[32], [64], [1], [5, 0, 17, 9], [40, 24], [1] * 33, [96], [50, 1, 30], [49, 48]]


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
    parameters: list[torch.Tensor],
    ids: torch.Tensor,
    ends: torch.Tensor,
    size: tuple[int, int, int],
    options: str = "",
) -> torch.Tensor:
    """The op's hidden states; `max_seqlen` is the capacity."""
    op = torch.ops.fastertransformer.encode
    return op(ids, ids % 2, None, ends, len(ids), parameters, specification(size), options)


def exactly(
    parameters: list[torch.Tensor],
    ids: torch.Tensor,
    ends: torch.Tensor,
    size: tuple[int, int, int],
) -> torch.Tensor:
    """The same in fp32, by the twin."""
    return twins.encode(
        *(ids, ids % 2, None, ends, len(ids)),
        [p.float() for p in parameters],
        specification(size),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_against_fp32_and_again(
    size: tuple[int, int, int], lengths: list[int], dtype: torch.dtype
) -> None:
    parameters, (ids, ends) = random_stack(size, dtype), inputs(lengths)
    out = encode(parameters, ids, ends, size)
    exact = exactly(parameters, ids, ends, size)
    bound = 3e-3 if dtype == torch.float16 else 2.4e-2
    assert (out.float() - exact).norm() / exact.norm() < bound
    for _ in range(20):
        assert torch.equal(encode(parameters, ids, ends, size), out)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_finite_stays_in_its_sequence(size: tuple[int, int, int], value: float) -> None:
    parameters, (ids, ends) = random_stack(size, torch.float16), inputs([9, 14, 23])
    healthy = encode(parameters, ids, ends, size)
    parameters[0][0] = value  # the word that no sequence has yet
    ids[12] = 0
    beside = encode(parameters, ids, ends, size)
    assert not beside[9:23].isfinite().any()
    assert torch.equal(beside[:9], healthy[:9])
    assert torch.equal(beside[23:], healthy[23:])


@pytest.mark.parametrize("size", SIZES)
def test_a_sequence_of_infinite_scores_is_nan(size: tuple[int, int, int]) -> None:
    """Keys of minus infinity by their bias, queries of one: all rows, and none becomes zero."""
    parameters, (ids, ends) = random_stack(size, torch.float16), inputs([9, 14, 23])
    hidden = size[0]
    parameters[5][0], parameters[6][0] = 0, 1  # the first layer's qkv
    parameters[6][0, hidden : 2 * hidden] = float("-inf")
    assert encode(parameters, ids, ends, size).isnan().all()


def test_a_graph_follows_new_lengths() -> None:
    size = SIZES[0]
    parameters = random_stack(size, torch.float16)
    ids, _ = inputs([32])
    ends = torch.tensor([0, 32, 32, 32], dtype=torch.int32, device=DEVICE)
    encode(parameters, ids, ends, size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = encode(parameters, ids, ends, size)
    for lengths in ([32, 0, 0], [3, 11, 7], [10, 10, 12], [1, 0, 0]):
        ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        used = sum(lengths)
        assert torch.equal(out[:used], encode(parameters, ids, ends, size)[:used])
        exact = exactly(parameters, ids[:used], ends, size)
        assert (out[:used].float() - exact).norm() / exact.norm() < 3e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_option_turns_them_off_and_interface_1_knows_them(dtype: torch.dtype) -> None:
    size = SIZES[0]
    parameters, (ids, ends) = random_stack(size, dtype), inputs([5, 0, 17, 9])
    out = encode(parameters, ids, ends, size)
    without = encode(parameters, ids, ends, size, "few_tokens=0")
    assert not torch.equal(out, without)  # other kernels sum in another order
    exact = exactly(parameters, ids, ends, size)
    bound = 3e-3 if dtype == torch.float16 else 2.4e-2
    assert (without.float() - exact).norm() / exact.norm() < bound
    old = torch.ops.fastertransformer.encoder
    again = old(ids, ids % 2, None, ends, len(ids), *parameters, size[1], 1e-12)
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 2048])
@pytest.mark.parametrize("lengths", [[5, 0, 17, 9], [113, 7, 1, 511]])
def test_shared_layers_and_projected_embeddings(
    lengths: list[int], width: int, dtype: torch.dtype
) -> None:
    size = SIZES[1]
    parameters = random_stack(size, dtype, 512)
    g = torch.Generator(device=DEVICE).manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, generator=g).to(dtype)

    tables = [draw(len(table), width) for table in parameters[:3]]
    norm = [draw(width) * 0.1 + 1, draw(width) * 0.1]
    layers = [stack[:1] for stack in parameters[5:]]
    projection = [draw(size[0], width) * width**-0.5, draw(size[0])]
    everything = [*tables, *norm, *layers, *projection]
    names = ",embeddings.projection.weight,embeddings.projection.bias"
    spec = specification(size).replace(f"embedding={size[0]}", f"embedding={width}") + names
    ids, ends = inputs(lengths)
    arguments = (ids, ids % 2, None, ends, max(lengths))
    out = torch.ops.fastertransformer.encode(*arguments, everything, spec, "")
    exact = twins.encode(*arguments, [p.float() for p in everything], spec)
    bound = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}[dtype]
    assert (out.float() - exact).norm() / exact.norm() < bound
    # Sharing is no other arithmetic than a copy for each layer.
    copied = [
        *tables,
        *norm,
        *[p.repeat(LAYERS, *[1] * (p.dim() - 1)) for p in layers],
        *projection,
    ]
    assert torch.equal(torch.ops.fastertransformer.encode(*arguments, copied, spec, ""), out)


def test_prepared_weights_know_their_place() -> None:
    ops = torch.ops.fastertransformer
    weight = torch.randn(2, 40, 24, device=DEVICE)
    prepared = ops.prepare_weight(weight)
    assert ops.is_prepared(prepared, weight)
    for other in (weight.half(), weight[:1], weight.cpu()):
        assert not ops.is_prepared(prepared, other)
    assert not ops.is_prepared(ops.prepare_weight(weight.cpu()), weight)
    assert not ops.is_prepared(torch.empty(0), weight)
