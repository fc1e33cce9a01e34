"""Linear layers on the GPU, every plan of them, against the eager twin."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ft_handler import load_library
from ft_handler.native import twins
from ft_handler.tuning import measure, table

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [1, 7, 63, 113, 129, 511, 515, 1344]
# [n, k]: BERT's, a K that does not split evenly, widths with a norm variant each, and widths that
# only cuBLASLt takes.
SIZES = [(2304, 768), (768, 768), (768, 832), (768, 3072), (1024, 1024), (200, 72), (30, 50)]
EPS = 1e-12


@pytest.fixture(autouse=True)
def _library() -> None:
    load_library()


def within_twice(ours: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether our error is at most twice plain PyTorch's (fp32: rounding alone, 1e-6).

    `plain` and `exact` may have more rows than `ours`: the error of one short row halves and
    doubles by luck, so the budget comes from many.
    """
    assert ours.shape[1:] == exact.shape[1:]
    assert plain.shape == exact.shape

    def error(x: Tensor) -> float:
        wanted = exact[: len(x)].double()
        value = float((x.double() - wanted).norm() / wanted.norm())
        return value if math.isfinite(value) else math.inf

    return error(ours) <= max(2 * error(plain), 1e-6)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["bias", "gelu", "residual", "norm"])
def test_every_plan(size: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    ops = torch.ops.fastertransformer
    n, k = size
    gelu, norm, added = kind == "gelu", kind == "norm", kind in ("residual", "norm")
    activation = "gelu" if gelu else ""
    w = normal(n, k, dtype=dtype, scale=k**-0.5)
    bias, gamma, beta = (normal(n, dtype=dtype) for _ in range(3))
    name = str(dtype).removeprefix("torch.")
    for rows in ROWS:
        many = max(rows, 256)
        x, residual = normal(many, k, dtype=dtype), normal(many, n, dtype=dtype)
        exact = twins.linear(x, w, bias, residual if added else None, activation)
        plain = F.linear(x, w, bias)
        plain = F.gelu(plain) if gelu else plain + residual if added else plain
        if norm:
            exact = F.layer_norm(exact.float(), (n,), gamma.float(), beta.float(), EPS)
            plain = F.layer_norm(plain, (n,), gamma, beta, EPS)
        plans = ops.gemm_candidates(w, rows, gelu, added, norm).split("\n")
        for plan in (*plans, "cublaslt"):  # the last one: that library's own choice
            ops.load_gemm_plan(0, name, rows, n, k, gelu, added, norm, plan)
            if norm:
                ours = ops.linear_layer_norm(x[:rows], w, bias, residual[:rows], gamma, beta, EPS)
            else:
                ours = ops.linear(x[:rows], w, bias, residual[:rows] if added else None, activation)
            assert ours.shape == (rows, n)
            assert within_twice(ours, plain, exact), f"{rows} rows, plan {plan}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3072, 768), (200, 72), (30, 50)], ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_every_plan_of_other_activations(
    activation: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """They go by the plans that are loaded for GELU, where a kernel knows them."""
    ops = torch.ops.fastertransformer
    n, k = size
    x = normal(1344, k, dtype=dtype)
    w, bias = normal(n, k, dtype=dtype, scale=k**-0.5), normal(n, dtype=dtype)
    exact = twins.linear(x, w, bias, None, activation)
    plain = twins.activated(F.linear(x, w, bias), activation).to(dtype)
    name = str(dtype).removeprefix("torch.")
    for rows in (1, 113, 515, 1344):
        for plan in (*ops.gemm_candidates(w, rows, True, False, False).split("\n"), "cublaslt"):
            ops.load_gemm_plan(0, name, rows, n, k, True, False, False, plan)
            ours = ops.linear(x[:rows], w, bias, None, activation)
            assert within_twice(ours, plain, exact), f"{rows} rows, plan {plan}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_the_bound_of_other_activations(activation: str, dtype: torch.dtype) -> None:
    """2^-10 of the result and its rounding, where it is a normal number not below 2^-119."""
    ops = torch.ops.fastertransformer
    x = torch.linspace(-90, 20, 4096, device="cuda").to(dtype)
    wide = x.double()
    if activation == "gelu_tanh":
        inner = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        want = wide * torch.sigmoid(inner)
    else:
        want = wide.relu() if activation == "relu" else wide * torch.sigmoid(wide)
    bound = want.abs() * (2.0**-10 + torch.finfo(dtype).eps / 2)
    off = (ops.bias_activation(x[None], None, activation)[0].double() - want).abs()
    least = max(torch.finfo(dtype).tiny, 2.0**-119)
    assert (off <= bound)[want.abs() >= least].all()
    assert (off <= bound + least).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(768, 64), (2304, 768), (30, 50)], ids=str)
def test_every_plan_holds_the_bound_of_gelu(size: tuple[int, int], dtype: torch.dtype) -> None:
    """2^-10 of the result (fp32: 2^-13) and its rounding, where it is a normal number.

    A product of zeros leaves the bias, which is exact. A plan that activates in a pass of its own
    rounds nothing on the way.
    """
    ops = torch.ops.fastertransformer
    n, k = size
    x = torch.zeros(511, k, device="cuda", dtype=dtype)
    w = torch.zeros(n, k, device="cuda", dtype=dtype)
    bias = torch.linspace(-13.5, 9, n, device="cuda").to(dtype)
    wide = bias.double()
    want = 0.5 * wide * torch.special.erfc(-wide * math.sqrt(0.5))
    normal_numbers = want.abs() >= max(torch.finfo(dtype).tiny, 2.0**-120)
    share = 2.0**-13 if dtype == torch.float32 else 2.0**-10
    bound = want.abs() * (share + torch.finfo(dtype).eps / 2)
    name = str(dtype).removeprefix("torch.")
    for rows in (1, 129, 511):
        for plan in (*ops.gemm_candidates(w, rows, True, False, False).split("\n"), "cublaslt"):
            ops.load_gemm_plan(0, name, rows, n, k, True, False, False, plan)
            off = (ops.linear(x[:rows], w, bias, None, "gelu").double() - want).abs()
            assert (off <= bound)[:, normal_numbers].all(), f"{rows} rows, plan {plan}"
            assert (off <= bound + torch.finfo(dtype).tiny + 2.0**-120).all()
    alone = ops.bias_activation(bias[None], None, "gelu")[0]
    assert ((alone.double() - want).abs() <= bound)[normal_numbers].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_every_plan_keeps_plus_infinity(activation: str, dtype: torch.dtype) -> None:
    """Minus infinity becomes NaN (relu: 0), as in torch, and NaN stays."""
    ops = torch.ops.fastertransformer
    name = str(dtype).removeprefix("torch.")
    for n, k in ((768, 64), (30, 50)):
        x, w = (torch.zeros(rows, k, device="cuda", dtype=dtype) for rows in (511, n))
        bias = normal(n, dtype=dtype)
        bias[0::7], bias[1::7], bias[2::7] = math.inf, -math.inf, math.nan
        # Not torch's GELU: of +inf that is NaN on some CPUs.
        infinite = bias.isposinf()
        none = bias.isnan() | (bias.isneginf() & (activation != "relu"))
        alone = ops.bias_activation(bias[None], None, activation)
        assert torch.equal(alone[0].isposinf(), infinite)
        assert torch.equal(alone[0].isnan(), none)
        for rows in (1, 129, 511):
            for plan in (*ops.gemm_candidates(w, rows, True, False, False).split("\n"), "cublaslt"):
                ops.load_gemm_plan(0, name, rows, n, k, True, False, False, plan)
                got = ops.linear(x[:rows], w, bias, None, activation)
                assert (got.isposinf() == infinite).all(), f"{rows} rows, plan {plan}"
                assert (got.isnan() == none).all(), f"{rows} rows, plan {plan}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_activation_before_a_residual(dtype: torch.dtype) -> None:
    ops = torch.ops.fastertransformer
    for n, k in ((768, 768), (30, 50)):
        x, w = normal(77, k, dtype=dtype), normal(n, k, dtype=dtype, scale=k**-0.5)
        bias, residual = normal(n, dtype=dtype), normal(77, n, dtype=dtype)
        plain = F.gelu(F.linear(x, w, bias)) + residual
        exact = twins.linear(x, w, bias, residual, "gelu")
        assert within_twice(ops.linear(x, w, bias, residual, "gelu"), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_blocks_that_split_k_add_in_order(dtype: torch.dtype) -> None:
    ops = torch.ops.fastertransformer
    rows, n, k = 384, 768, 832
    x, w = normal(rows, k, dtype=dtype), normal(n, k, dtype=dtype, scale=k**-0.5)
    bias, residual = normal(n, dtype=dtype), normal(rows, n, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    candidates = ops.gemm_candidates(w, rows, False, True, False).split("\n")
    plans = [plan for plan in candidates if plan.startswith("sm90:together 128x128 /")]
    assert len(plans) == 2
    for plan in plans:
        ops.load_gemm_plan(0, name, rows, n, k, False, True, False, plan)
        first = ops.linear(x, w, bias, residual)
        for _ in range(20):
            assert torch.equal(ops.linear(x, w, bias, residual), first)
        # A row is the same in any company.
        for some in (1, 7, 130):
            ops.load_gemm_plan(0, name, some, n, k, False, True, False, plan)
            ours = ops.linear(x[:some], w, bias, residual[:some])
            assert torch.equal(ours, first[:some])


def test_without_bias_and_without_rows() -> None:
    ops = torch.ops.fastertransformer
    x, w = normal(77, 768, dtype=torch.float16), normal(768, 768, dtype=torch.float16, scale=0.036)
    exact = twins.linear(x, w, None, None)
    assert within_twice(ops.linear(x, w, None, None), F.linear(x, w), exact)
    assert ops.linear(x[:0], w, None, None).shape == (0, 768)


def test_refusals_name_the_op_and_the_shapes() -> None:
    ops = torch.ops.fastertransformer
    x, w = normal(4, 64, dtype=torch.float16), normal(32, 48, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="input must have size 48 on axis 1"):
        ops.linear(x, w, None, None)
    with pytest.raises(RuntimeError, match="tune again"):
        ops.load_gemm_plan(0, "float16", 4, 32, 48, False, False, False, "sm90:no such kernel")


@pytest.mark.parametrize("dtype", ["float16", table.NARROW])
def test_a_measured_table_is_written_and_loaded(tmp_path, dtype: str) -> None:
    like = torch.empty(16, 16, dtype=torch.float16, device="cuda")
    if dtype == table.NARROW and not torch.ops.fastertransformer.serves_narrow(like):
        pytest.skip("this GPU has no products in e4m3")
    gpu = torch.cuda.get_device_name()
    entries = measure.measure(768, 3072, 12, 100, dtype)
    rows = torch.ops.fastertransformer.gemm_row_class(100)
    assert [(e.rows, e.n, e.k) for e in entries] == [
        (rows, layer.n, layer.k) for layer in measure.layers_of(768, 3072)
    ]
    path = tmp_path / "table.json"
    table.write_table(path, gpu, entries)
    shipped = table.shipped_path(gpu)
    carried = table.read_table(shipped)["entries"] if shipped.exists() else []
    loaded = sum(len(table.HALF) if entry["dtype"] in table.HALF else 1 for entry in carried)
    assert table.load_table(path) == loaded + 4
