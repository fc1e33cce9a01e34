"""Variable-length attention on the GPU against its eager twin and eager PyTorch's own error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ft_handler import load_library
from ft_handler.native import twins

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [
    [1],
    [7],
    [113],
    [511],
    [1, 7, 113, 511, 64, 65, 128, 129],
    [3, 30, 25, 1, 64, 2, 17],
    [120, 3, 128, 77, 65],
    [193, 577, 63],
]


@pytest.fixture(autouse=True)
def _exact_reference() -> None:
    load_library()
    torch.backends.cuda.matmul.allow_tf32 = False


def offsets(lengths: Sequence[int], empty: int = 0) -> Tensor:
    """cu_seqlens on the GPU, with `empty` zero-length sequences at the end."""
    sums = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat([sums, sums[-1:].repeat(empty)]).cuda()


def draw(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Random packed q, k, v; queries twice as large, so that probabilities are not all alike."""
    qkv = torch.randn(tokens, 3, heads * head_dim, device="cuda")
    qkv[:, 0] *= 2
    return qkv.reshape(tokens, -1).to(dtype)


def attend(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: int) -> Tensor:
    out = torch.ops.fastertransformer.varlen_attention(qkv, cu_seqlens, max_seqlen, heads)
    assert isinstance(out, Tensor)
    return out


def eager(qkv: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    """What plain PyTorch computes in qkv's own dtype."""
    parts, begin = [], 0
    for n in lengths:
        q, k, v = qkv[begin : begin + n].reshape(n, 3, heads, -1).permute(1, 2, 0, 3)
        p = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        parts.append((p @ v).transpose(0, 1).reshape(n, -1))
        begin += n
    return torch.cat(parts)


def error(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖, infinite with a NaN."""
    assert ours.shape == exact.shape
    value = float((ours.double() - exact.double()).norm() / exact.double().norm())
    return value if math.isfinite(value) else math.inf


def check(lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """At most twice eager PyTorch's error (fp32: summation order alone, 2e-6)."""
    qkv, cu = draw(sum(lengths), heads, head_dim, dtype), offsets(lengths)
    exact = twins.varlen_attention(qkv, cu, max(lengths), heads)
    budget = max(2 * error(eager(qkv, lengths, heads), exact), 2e-6)
    assert error(attend(qkv, cu, max(lengths), heads), exact) <= budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_head_sizes_dtypes(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    check(lengths, 3 if head_dim % 8 == 0 else 4, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_longest_sequence(head_dim: int, dtype: torch.dtype) -> None:
    check([4096, 40], 2, head_dim, dtype)


@pytest.mark.parametrize("longest", [50, 128, 384])
@pytest.mark.parametrize("batch", [64, 512])
def test_many_sequences(batch: int, longest: int) -> None:
    lengths = torch.randint(1, longest + 1, (batch,)).tolist()
    check(lengths, 2, 64, torch.float16)


@pytest.mark.parametrize("lengths", [[1, 2, 3] * 800, ([1] + [0] * 1023) * 4, [40, 30] * 1100])
def test_more_sequences_than_a_planning_round(lengths: list[int]) -> None:
    qkv, cu = draw(sum(lengths), 2, 64, torch.float16), offsets(lengths)
    exact = twins.varlen_attention(qkv, cu, max(lengths), 2)
    assert error(attend(qkv, cu, max(lengths), 2), exact) < 2e-3


@pytest.mark.parametrize("head_dim", [6, 32, 64, 80, 128])
@pytest.mark.parametrize("lengths", [[3, 30, 25], [120, 3, 77], [300, 50, 129]], ids=str)
def test_capacity_beyond_the_batch(lengths: list[int], head_dim: int) -> None:
    """A graph's class: empty sequences at the end, stray rows, a larger max_seqlen."""
    heads, tokens, pad = 2, sum(lengths), 37
    qkv = draw(tokens + pad, heads, head_dim, torch.float16)
    qkv[tokens:] = math.nan
    cu = offsets(lengths, empty=5)
    exact = twins.varlen_attention(qkv[:tokens], cu, max(lengths), heads)
    budget = 2 * error(eager(qkv[:tokens], lengths, heads), exact)
    for stretch in (0, 200):
        ours = attend(qkv, cu, max(lengths) + stretch, heads)[:tokens]
        assert error(ours, exact) <= budget


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 128])
@pytest.mark.parametrize("part", ["all", "values"])
@pytest.mark.parametrize("spoiler", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize(
    "lengths", [[40, 20, 3], [3, 1, 50, 8], [100, 128, 30], [64, 30, 34], [500, 130]], ids=str
)
def test_neighbours_do_not_leak(
    lengths: list[int], spoiler: float, part: str, head_dim: int, dtype: torch.dtype
) -> None:
    """Infinities and NaNs in one sequence stay there, and the others' answers keep every bit."""
    heads = 2
    qkv, cu = draw(sum(lengths), heads, head_dim, dtype), offsets(lengths)
    clean = attend(qkv, cu, max(lengths), heads)
    begin, end = lengths[0], lengths[0] + lengths[1]
    first = 0 if part == "all" else 2 * heads * head_dim
    qkv[begin:end, first:] = spoiler
    spoilt = attend(qkv, cu, max(lengths), heads)
    assert torch.equal(spoilt[:begin], clean[:begin])
    assert torch.equal(spoilt[end:], clean[end:])
    assert not spoilt[begin:end].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [6, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("spoiler", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("lengths", [[40, 20, 3], [100, 128, 30], [500, 130, 64]], ids=str)
def test_rows_of_infinite_scores_are_nan(
    lengths: list[int], spoiler: float, head_dim: int, dtype: torch.dtype
) -> None:
    """Keys alone are spoilt and queries positive: each score of the sequence is the spoiler."""
    heads = 2
    qkv, cu = draw(sum(lengths), heads, head_dim, dtype), offsets(lengths)
    begin, end, hidden = lengths[0], lengths[0] + lengths[1], heads * head_dim
    qkv[begin:end, :hidden] = 1
    clean = attend(qkv, cu, max(lengths), heads)
    qkv[begin:end, hidden : 2 * hidden] = spoiler
    spoilt = attend(qkv, cu, max(lengths), heads)
    assert torch.equal(spoilt[:begin], clean[:begin])
    assert torch.equal(spoilt[end:], clean[end:])
    assert spoilt[begin:end].isnan().all()


@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
def test_one_infinity_stays_in_its_sequence(head_dim: int) -> None:
    """A single value: the smallest spoilt thing that a tile can hold, at each of its places."""
    lengths, heads = [20, 17, 27], 1
    clean_qkv, cu = draw(sum(lengths), heads, head_dim, torch.float16), offsets(lengths)
    clean = attend(clean_qkv, cu, max(lengths), heads)
    for row in range(20, 37):
        qkv = clean_qkv.clone()
        qkv[row, 2 * head_dim + row % head_dim] = math.inf
        spoilt = attend(qkv, cu, max(lengths), heads)
        assert torch.equal(spoilt[:20], clean[:20])
        assert torch.equal(spoilt[37:], clean[37:])
        assert not spoilt[20:37, row % head_dim].isfinite().any()


@pytest.mark.parametrize("lengths", [[40, 20, 3], [100, 128, 30], [500, 130, 511]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_exactly(lengths: list[int], dtype: torch.dtype) -> None:
    qkv, cu = draw(sum(lengths), 4, 64, dtype), offsets(lengths)
    first = attend(qkv, cu, max(lengths), 4)
    for _ in range(5):
        assert torch.equal(attend(qkv, cu, max(lengths), 4), first)


def test_nothing_to_do() -> None:
    empty = torch.empty(0, 3 * 64, device="cuda", dtype=torch.float16)
    assert attend(empty, offsets([]), 0, 1).shape == (0, 64)
    assert attend(empty, offsets([], empty=3), 16, 1).shape == (0, 64)


def test_graph_follows_new_lengths() -> None:
    """A captured call reads cu_seqlens when it is replayed."""
    heads, tokens = 2, 400
    qkv, cu = draw(tokens, heads, 64, torch.float16), offsets([200, 200], empty=6)
    attend(qkv, cu, 256, heads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(qkv, cu, 256, heads)
    for lengths in ([200, 200], [256, 1, 90], [50] * 8, [3]):
        cu.copy_(offsets(lengths, empty=8 - len(lengths)))
        graph.replay()
        live = sum(lengths)
        exact = twins.varlen_attention(qkv[:live], offsets(lengths), 256, heads)
        assert error(out[:live], exact) < 1e-3
