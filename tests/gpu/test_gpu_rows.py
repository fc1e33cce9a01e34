"""Layer norms, embeddings, activations, pools and padding on the GPU against their eager twins."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ft_handler import load_library
from ft_handler.native import twins

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HIDDEN = [8, 30, 250, 384, 768, 1024, 1280, 8200]
EPS = 1e-12
PLAIN_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def _library() -> None:
    load_library()


def within_twice(ours: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether our error is at most twice plain PyTorch's (fp32: rounding alone, 1e-6)."""
    assert ours.shape == exact.shape

    def error(x: Tensor) -> float:
        value = float((x.double() - exact.double()).norm() / exact.double().norm())
        return value if math.isfinite(value) else math.inf

    return error(ours) <= max(2 * error(plain), 1e-6)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", [1, 7, 511, 4096])
@pytest.mark.parametrize("biased", [True, False])
def test_residual_layer_norm(rows: int, hidden: int, dtype: torch.dtype, biased: bool) -> None:
    x, residual = normal(rows, hidden, dtype=dtype), normal(rows, hidden, dtype=dtype)
    gamma, beta = normal(hidden, dtype=dtype), normal(hidden, dtype=dtype)
    bias = normal(hidden, dtype=dtype) if biased else None
    ours = torch.ops.fastertransformer.residual_layer_norm(x, bias, residual, gamma, beta, EPS)
    summed = x + residual if bias is None else x + bias + residual
    plain = F.layer_norm(summed, (hidden,), gamma, beta, EPS)
    exact = twins.residual_layer_norm(x, bias, residual, gamma, beta, EPS)
    assert within_twice(ours, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [6, 30, 768, 3072])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", sorted(PLAIN_ACTIVATIONS))
def test_bias_activation(activation: str, width: int, dtype: torch.dtype, biased: bool) -> None:
    x, bias = normal(511, width, dtype=dtype), normal(width, dtype=dtype) if biased else None
    ours = torch.ops.fastertransformer.bias_activation(x, bias, activation)
    plain = PLAIN_ACTIVATIONS[activation](x if bias is None else x + bias)
    assert within_twice(ours, plain, twins.bias_activation(x, bias, activation))


def pooled(rows: Tensor, lengths: list[int], how: str) -> Tensor:
    """What plain PyTorch makes of each sequence, in the rows' own type."""
    parts = rows.split(lengths)
    return torch.stack([part.mean(0) if how == "mean" else part.amax(0) for part in parts])


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("lengths", [[1], [7], [113], [511], [1, 7, 113, 511, 64], [9] * 300])
def test_segment_pool(lengths: list[int], hidden: int, dtype: torch.dtype, how: str) -> None:
    """Empty sequences at the end give zeros, rows after the last one do not count."""
    tokens = sum(lengths)
    x = normal(tokens + 5, hidden, dtype=dtype)
    x[tokens:] = math.nan
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    cu = torch.cat([cu, cu[-1:].repeat(3)]).cuda()
    ours = torch.ops.fastertransformer.segment_pool(x, cu, how)
    assert ours.dtype == torch.float32
    assert not ours[len(lengths) :].any()
    exact = twins.segment_pool(x, cu, how)[: len(lengths)]
    assert within_twice(ours[: len(lengths)], pooled(x[:tokens], lengths, how), exact)


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [30, 768])
def test_a_pool_does_not_depend_on_the_batch(hidden: int, dtype: torch.dtype, how: str) -> None:
    pool = torch.ops.fastertransformer.segment_pool
    lengths = torch.randint(1, 300, (400,))
    rows = normal(int(lengths.sum()), hidden, dtype=dtype)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    everyone = pool(rows, bounds.cuda(), how)
    for i in range(0, 400, 23):
        begin, end = int(bounds[i]), int(bounds[i + 1])
        alone = torch.tensor([0, end - begin], dtype=torch.int32, device="cuda")
        assert torch.equal(pool(rows[begin:end], alone, how)[0], everyone[i])


def test_a_pool_keeps_what_is_not_finite_where_it_is() -> None:
    rows = normal(30, 64, dtype=torch.float16)
    cu = torch.tensor([0, 10, 20, 30], dtype=torch.int32, device="cuda")
    rows[15, 3], rows[16, 5], rows[17, 5] = math.nan, -math.inf, math.nan
    for how in ("mean", "max"):
        ours = torch.ops.fastertransformer.segment_pool(rows, cu, how)
        assert torch.equal(ours.isnan(), twins.segment_pool(rows, cu, how).isnan())
    rows[10:20] = -math.inf
    assert (torch.ops.fastertransformer.segment_pool(rows, cu, "max")[1] == -math.inf).all()


def test_a_captured_pool_follows_new_lengths() -> None:
    rows = normal(300, 768, dtype=torch.float16)
    cu = torch.tensor([0, 100, 300, 300, 300], dtype=torch.int32, device="cuda")
    torch.ops.fastertransformer.segment_pool(rows, cu, "mean")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.fastertransformer.segment_pool(rows, cu, "mean")
    for bounds in ([0, 1, 2, 3, 4], [0, 300, 300, 300, 300], [0, 113, 120, 299, 300]):
        cu.copy_(torch.tensor(bounds))
        graph.replay()
        assert (out - twins.segment_pool(rows, cu, "mean")).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("given", [True, False])
def test_embedding_layer_norm(
    hidden: int, dtype: torch.dtype, id_type: torch.dtype, given: bool
) -> None:
    """Positions given or found from cu_seqlens; rows past the last sequence are zeros."""
    lengths, pad = torch.randint(1, 40, (70,)), 5
    cu = F.pad(lengths.cumsum(0), (1, 3), value=0).int()
    tokens = int(lengths.sum())
    cu[-3:] = tokens
    cu = cu.cuda()
    word, position, kind = (normal(n, hidden, dtype=dtype) for n in (100, 40, 2))
    gamma, beta = normal(hidden, dtype=dtype), normal(hidden, dtype=dtype)
    ids = torch.randint(0, 100, (tokens + pad,), device="cuda", dtype=id_type)
    types = torch.randint(0, 2, (tokens + pad,), device="cuda", dtype=id_type)
    columns = twins.positions_of(cu, tokens + pad).int()
    ours = torch.ops.fastertransformer.embedding_layer_norm(
        ids, types, columns if given else None, cu, word, position, kind, gamma, beta, EPS
    )
    live = slice(0, tokens)
    rows = word[ids[live].long()] + position[columns[live].long()] + kind[types[live].long()]
    exact = twins.embedding_layer_norm(
        ids[live], types[live], columns[live], cu, word, position, kind, gamma, beta, EPS
    )
    assert within_twice(ours[live], F.layer_norm(rows, (hidden,), gamma, beta, EPS), exact)
    assert not ours[tokens:].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 128), (1100, 5)])
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64], ids=str)
def test_padding_there_and_back(shape: tuple[int, int], id_type: torch.dtype) -> None:
    mask = torch.rand(shape, device="cuda") < 0.7
    mask[:, 0] = True
    ids = torch.randint(0, 1000, shape, device="cuda", dtype=id_type)
    types = torch.randint(0, 2, shape, device="cuda", dtype=id_type)
    ours = torch.ops.fastertransformer.remove_padding(ids, types, mask.to(id_type))
    exact = twins.remove_padding(ids, types, mask.to(id_type))
    for one, other in zip(ours[:5], exact[:5], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert ours[5] == exact[5]
    for dtype in DTYPES:
        for width in ((), (6,), (768,)):
            packed = torch.randn(len(ours[0]), *width, device="cuda", dtype=dtype)
            back = torch.ops.fastertransformer.restore_padding(packed, ours[3], *shape, -10000.0)
            assert torch.equal(back, twins.restore_padding(packed, exact[3], *shape, -10000.0))


def test_padding_refusals() -> None:
    ids = torch.zeros(2, 3, device="cuda", dtype=torch.int64)
    for row in ([0, 0, 0], [0, 1, 1]):
        mask = torch.tensor([[1, 1, 1], row], device="cuda")
        with pytest.raises(RuntimeError, match="attention_mask"):
            torch.ops.fastertransformer.remove_padding(ids, ids, mask)


def test_empty() -> None:
    x = torch.empty(0, 768, device="cuda", dtype=torch.float16)
    g = torch.ones(768, device="cuda", dtype=torch.float16)
    ops = torch.ops.fastertransformer
    assert ops.residual_layer_norm(x, None, x, g, g, EPS).shape == (0, 768)
    assert ops.bias_activation(x, None, "gelu").shape == (0, 768)
    nobody = torch.zeros(1, dtype=torch.int32, device="cuda")
    assert ops.segment_pool(x, nobody, "mean").shape == (0, 768)
    assert not ops.segment_pool(x, nobody.repeat(4), "max").any()
