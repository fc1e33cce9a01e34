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


#: Heads enough for more tiles than run at once, which take another kernel on sm_90.
MANY = 300


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


def draw_bias(heads: int, distance: int, dtype: torch.dtype) -> Tensor:
    """A relative bias as large as scores are."""
    return (torch.randn(heads, 2 * distance + 1, device="cuda") * 2).to(dtype)


def attend(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: int, bias: Tensor | None = None
) -> Tensor:
    out = torch.ops.fastertransformer.varlen_attention(qkv, cu_seqlens, max_seqlen, heads, bias)
    assert isinstance(out, Tensor)
    return out


def eager(qkv: Tensor, lengths: Sequence[int], heads: int, bias: Tensor | None = None) -> Tensor:
    """What plain PyTorch computes in qkv's own dtype."""
    parts, begin = [], 0
    for n in lengths:
        q, k, v = qkv[begin : begin + n].reshape(n, 3, heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + twins.bias_of_distances(bias, n).to(qkv.dtype)
        p = torch.softmax(scores, -1)
        parts.append((p @ v).transpose(0, 1).reshape(n, -1))
        begin += n
    return torch.cat(parts)


def error(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖, infinite with a NaN."""
    assert ours.shape == exact.shape
    value = float((ours.double() - exact.double()).norm() / exact.double().norm())
    return value if math.isfinite(value) else math.inf


def check(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> None:
    """At most twice eager PyTorch's error (fp32: summation order alone, 2e-6)."""
    qkv, cu = draw(sum(lengths), heads, head_dim, dtype), offsets(lengths)
    exact = twins.varlen_attention(qkv, cu, max(lengths), heads, bias)
    budget = max(2 * error(eager(qkv, lengths, heads, bias), exact), 2e-6)
    assert error(attend(qkv, cu, max(lengths), heads, bias), exact) <= budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_head_sizes_dtypes(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    check(lengths, 3 if head_dim % 8 == 0 else 4, head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_more_tiles_than_run_at_once(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    check(lengths, MANY, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [6, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_relative_bias(lengths: list[int], head_dim: int, dtype: torch.dtype) -> None:
    """Distances that end within a tile, that no sequence has, that no table of a kernel holds."""
    heads = 3 if head_dim % 8 == 0 else 4
    for distance in (0, 1, 31, 128, 600):
        check(lengths, heads, head_dim, dtype, draw_bias(heads, distance, dtype))


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("longest", [50, 128, 384])
def test_relative_bias_of_many_sequences(longest: int, head_dim: int) -> None:
    lengths = torch.randint(1, longest + 1, (512,)).tolist()
    for distance in (16, 128):
        bias = draw_bias(12, distance, torch.float16)
        check(lengths, 12, head_dim, torch.float16, bias)


def test_relative_bias_of_the_longest_sequence() -> None:
    for distance in (128, 512, 513):
        check([4096, 40], 2, 64, torch.float16, draw_bias(2, distance, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize("hidden", ["near", "behind", "far", "all"])
def test_a_bias_of_minus_infinity_hides_keys(
    hidden: str, head_dim: int, dtype: torch.dtype
) -> None:
    """Whole tiles of hidden keys, before those seen and after them; a row that sees none is NaN."""
    distance, heads = 100, 2
    bias = draw_bias(heads, distance, dtype)
    columns = torch.arange(-distance, distance + 1, device="cuda")
    seen = {
        "near": columns >= 70,
        "behind": columns >= 0,
        "far": columns.abs() < distance,
        "all": columns > distance,
    }[hidden]
    bias[:, ~seen] = -math.inf
    for lengths in ([40, 64, 3], [100, 128, 30], [511, 113, 300]):
        qkv, cu = draw(sum(lengths), heads, head_dim, dtype), offsets(lengths)
        exact = twins.varlen_attention(qkv, cu, max(lengths), heads, bias)
        ours = attend(qkv, cu, max(lengths), heads, bias)
        assert torch.equal(ours.isnan(), exact.isnan())
        if exact.isnan().all():
            continue
        plain, exact = eager(qkv, lengths, heads, bias).nan_to_num(), exact.nan_to_num()
        assert error(ours.nan_to_num(), exact) <= max(2 * error(plain, exact), 2e-6)


@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize("lengths", [[40, 20, 3], [100, 128, 30], [500, 130, 511]], ids=str)
def test_a_bias_of_zero_is_none_and_repeats_exactly(lengths: list[int], head_dim: int) -> None:
    heads = 2
    qkv, cu = draw(sum(lengths), heads, head_dim, torch.float16), offsets(lengths)
    zeros = torch.zeros(heads, 2 * 128 + 1, device="cuda", dtype=torch.float16)
    without = attend(qkv, cu, max(lengths), heads)
    assert error(attend(qkv, cu, max(lengths), heads, zeros), without) < 2e-4
    bias = draw_bias(heads, 128, torch.float16)
    first = attend(qkv, cu, max(lengths), heads, bias)
    for _ in range(5):
        assert torch.equal(attend(qkv, cu, max(lengths), heads, bias), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_of_minus_infinity_before_finite_ones(
    sign: float, head_dim: int, dtype: torch.dtype
) -> None:
    """Keys that are infinitely far off hide whole tiles; the others' scores are all that counts."""
    heads, length = 2, 300
    qkv, cu = draw(length, heads, head_dim, dtype), offsets([length])
    hidden = heads * head_dim
    qkv[:, :hidden] = sign
    qkv[:130, hidden : 2 * hidden] = -sign * math.inf
    exact = twins.varlen_attention(qkv, cu, length, heads)
    assert exact.isfinite().all()
    budget = max(2 * error(eager(qkv, [length], heads), exact), 2e-6)
    assert error(attend(qkv, cu, length, heads), exact) <= budget


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize("growth", [4, 40, 200])
@pytest.mark.parametrize("distance", [None, 40])
@pytest.mark.parametrize("heads", [2, MANY])
def test_scores_that_grow_with_every_tile(
    heads: int, distance: int | None, growth: int, head_dim: int, dtype: torch.dtype
) -> None:
    """By what half precision holds as a power of two, by what single precision holds, by more."""
    lengths = [511, 130, 40, 300]
    qkv, cu = draw(sum(lengths), heads, head_dim, dtype), offsets(lengths)
    hidden = heads * head_dim
    ramp = torch.cat([torch.linspace(0, growth, n, device="cuda") for n in lengths])
    qkv[:, :hidden] = 1
    qkv[:, hidden : 2 * hidden] = ramp[:, None].to(dtype)
    bias = None if distance is None else draw_bias(heads, distance, dtype)
    exact = twins.varlen_attention(qkv, cu, max(lengths), heads, bias)
    budget = max(2 * error(eager(qkv, lengths, heads, bias), exact), 2e-6)
    assert error(attend(qkv, cu, max(lengths), heads, bias), exact) <= budget


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
@pytest.mark.parametrize("heads", [2, MANY])
def test_capacity_beyond_the_batch(heads: int, lengths: list[int], head_dim: int) -> None:
    """A graph's class: empty sequences at the end, stray rows, a larger max_seqlen."""
    tokens, pad = sum(lengths), 37
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
@pytest.mark.parametrize("heads", [2, MANY])
def test_neighbours_do_not_leak(
    heads: int, lengths: list[int], spoiler: float, part: str, head_dim: int, dtype: torch.dtype
) -> None:
    """Infinities and NaNs in one sequence stay there, and the others' answers keep every bit."""
    qkv, cu = draw(sum(lengths), heads, head_dim, dtype), offsets(lengths)
    spoilt_qkv, begin, end = qkv.clone(), lengths[0], lengths[0] + lengths[1]
    first = 0 if part == "all" else 2 * heads * head_dim
    spoilt_qkv[begin:end, first:] = spoiler
    for bias in (None, draw_bias(heads, 40, dtype)):
        clean = attend(qkv, cu, max(lengths), heads, bias)
        spoilt = attend(spoilt_qkv, cu, max(lengths), heads, bias)
        assert torch.equal(spoilt[:begin], clean[:begin])
        assert torch.equal(spoilt[end:], clean[end:])
        assert not spoilt[begin:end].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [6, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("spoiler", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("lengths", [[40, 20, 3], [100, 128, 30], [500, 130, 64]], ids=str)
@pytest.mark.parametrize("heads", [2, MANY])
def test_rows_of_infinite_scores_are_nan(
    heads: int, lengths: list[int], spoiler: float, head_dim: int, dtype: torch.dtype
) -> None:
    """Keys alone are spoilt and queries positive: each score of the sequence is the spoiler."""
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
@pytest.mark.parametrize("heads", [2, MANY])
def test_repeats_exactly(heads: int, lengths: list[int], dtype: torch.dtype) -> None:
    qkv, cu = draw(sum(lengths), heads, 64, dtype), offsets(lengths)
    first = attend(qkv, cu, max(lengths), heads)
    for _ in range(5):
        assert torch.equal(attend(qkv, cu, max(lengths), heads), first)


def test_nothing_to_do() -> None:
    empty = torch.empty(0, 3 * 64, device="cuda", dtype=torch.float16)
    assert attend(empty, offsets([]), 0, 1).shape == (0, 64)
    assert attend(empty, offsets([], empty=3), 16, 1).shape == (0, 64)


@pytest.mark.parametrize("distance", [None, 90])
def test_graph_follows_new_lengths(distance: int | None) -> None:
    """A captured call reads cu_seqlens when it is replayed."""
    heads, tokens = 2, 400
    qkv, cu = draw(tokens, heads, 64, torch.float16), offsets([200, 200], empty=6)
    bias = None if distance is None else draw_bias(heads, distance, torch.float16)
    attend(qkv, cu, 256, heads, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(qkv, cu, 256, heads, bias)
    for lengths in ([200, 200], [256, 1, 90], [50] * 8, [3]):
        cu.copy_(offsets(lengths, empty=8 - len(lengths)))
        graph.replay()
        live = sum(lengths)
        exact = twins.varlen_attention(qkv[:live], offsets(lengths), 256, heads, bias)
        assert error(out[:live], exact) < 1e-3
