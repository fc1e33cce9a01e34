"""What the ops on the GPU make of arguments that lie, and torch's own checks of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_arguments import NAMES, OLD_NAMES, UNTRACEABLE, arguments
from stacks import LAYERS, VOCABULARY, narrow_stack

import ft_handler.native.ops  # noqa: F401 - loads the library, and what its ops make of fake tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case",
    ["attention", "encoders", "embeddings", "misaligned", "narrow_encoders", "paddings", "pools"],
)
def test_arguments_that_lie(case: str) -> None:
    script = Path(__file__).with_name("lying_arguments.py")
    places = [str(script.parents[2]), *sys.path]
    done = subprocess.run(
        [sys.executable, str(script), case],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in places if p)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", NAMES + OLD_NAMES)
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.fastertransformer, name).default
    prepare = torch.ops.fastertransformer.prepare_weight
    checks = ["test_schema", "test_autograd_registration"]
    if name not in UNTRACEABLE:
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, arguments(name, prepare, "cuda"), test_utils=checks)


def narrow_call(tokens: int = 40) -> list[Any]:
    """One call of `encode` whose products have e4m3 weights too, on sequences of 20 tokens."""
    ids = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    cu = torch.arange(0, tokens + 1, 20, dtype=torch.int32, device="cuda")
    return [ids, ids % 2, None, cu, 20, *narrow_stack((256, 4, 1024)), ""]


@pytest.mark.parametrize("tokens", [40, 5000])
def test_opcheck_of_the_encoder_in_fp8(tokens: int) -> None:
    # torch's checker of schemas compares tensors, which it cannot do for 8-bit floats.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.fastertransformer.encode.default
    torch.library.opcheck(op, tuple(narrow_call(tokens)), test_utils=checks)


def test_opcheck_of_what_serves_fp8() -> None:
    ops = torch.ops.fastertransformer
    weight = torch.randn(2, 32, 48, device="cuda").to(torch.float8_e4m3fn)
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.prepare_narrow.default, (weight,), test_utils=checks)
    checks = ("test_autograd_registration", "test_schema")
    torch.library.opcheck(ops.serves_narrow.default, (weight.half(),), test_utils=checks)
    half = weight.half()
    assert ops.serves_narrow(half) == (torch.cuda.get_device_capability() == (9, 0))
    for other in (half.float(), half.bfloat16(), half[:, :24], half[:, :, :40], half[0, 0]):
        assert not ops.serves_narrow(other)


def test_weights_in_fp8_that_do_not_fit_are_refused() -> None:
    encode = torch.ops.fastertransformer.encode
    good = narrow_call()
    stack, spec = good[5], good[6]
    before = encode(*good)
    names = dict(word.split("=", 1) for word in spec.split())["weights"].split(",")

    def refused(match: str, stack: list[torch.Tensor], spec: str) -> None:
        with pytest.raises(RuntimeError, match=match):
            encode(*good[:5], stack, spec, "")

    for at, name in enumerate(names):
        if not name.endswith(("narrow", "narrow_scale", "input_scale")):
            continue
        tensor = stack[at]
        for wrong in (
            tensor.to(torch.bfloat16),
            tensor[..., :-1].contiguous(),
            torch.cat([tensor.view(torch.uint8)] * 2).view(tensor.dtype),
            tensor[None],
            tensor.flatten()[:0],
            tensor.cpu(),
        ):
            refused(name.replace(".", r"\."), [*stack[:at], wrong, *stack[at + 1 :]], spec)
        # A product has all of its three tensors or none.
        rest = ",".join(other for other in names if other != name)
        without = spec.replace(",".join(names), rest)
        refused("e4m3", [*stack[:at], *stack[at + 1 :]], without)
    for floats in ("up:x", "up:-1", f"up:{LAYERS}", "norm1:0", "up:0:1", "up:99999999999"):
        refused("floats", stack, f"{spec} floats={floats}")
    assert torch.equal(encode(*good), before)


def test_order_of_columns_in_fp8_is_refused_where_there_is_none() -> None:
    prepare = torch.ops.fastertransformer.prepare_narrow
    weight = torch.zeros(2, 24, 48, device="cuda")
    for wrong in (weight, weight.half(), weight.to(torch.int8)):
        with pytest.raises(RuntimeError, match="float8_e4m3fn"):
            prepare(wrong)
    for columns in (1, 8, 40):
        with pytest.raises(RuntimeError, match="multiple of 16"):
            prepare(weight[..., :columns].contiguous().to(torch.float8_e4m3fn))


def test_a_prepared_weight_is_no_part_of_the_raw_one() -> None:
    weight = torch.randn(3, 16, 24, device="cuda", dtype=torch.float16)
    prepared = torch.ops.fastertransformer.prepare_weight(weight)
    assert prepared.data_ptr() != weight.data_ptr()
    assert torch.ops.fastertransformer.is_prepared(prepared, weight)
    assert torch.equal(prepared, weight)


def test_what_the_host_can_check_is_refused_in_words() -> None:
    ops = torch.ops.fastertransformer
    qkv = torch.randn(10, 96, device="cuda", dtype=torch.float16)
    cu = torch.tensor([0, 10], dtype=torch.int32, device="cuda")
    for bounds, most in ((cu, 0), (cu, -1), (cu[:1], 10)):
        with pytest.raises(RuntimeError, match=r"max_seqlen must be|cu_seqlens must end"):
            ops.varlen_attention(qkv, bounds, most, 1)
    for shape in ((2, 5), (1, 4), (5,), (1, 1, 5)):
        with pytest.raises(RuntimeError, match=r"relative_bias must have shape \[1, 2 D \+ 1\]"):
            ops.varlen_attention(qkv, cu, 10, 1, torch.zeros(shape, device="cuda").half())
    with pytest.raises(RuntimeError, match="relative_bias must have dtype float16"):
        ops.varlen_attention(qkv, cu, 10, 1, torch.zeros(1, 5, device="cuda"))
    with pytest.raises(RuntimeError, match="relative_bias is on another device"):
        ops.varlen_attention(qkv, cu, 10, 1, torch.zeros(1, 5).half())
    with pytest.raises(RuntimeError, match="how must be mean or max"):
        ops.segment_pool(qkv, cu, "sum")
    with pytest.raises(RuntimeError, match="cu_seqlens must end"):
        ops.segment_pool(qkv, cu[:1], "mean")
    with pytest.raises(RuntimeError, match="cu_seqlens is on another device"):
        ops.segment_pool(qkv, cu.cpu(), "mean")
    with pytest.raises(RuntimeError, match="activation must be"):
        ops.bias_activation(qkv, None, "tanh")
    ids = torch.zeros(10, dtype=torch.int64, device="cuda")
    tables = [torch.randn(10, 32, device="cuda") for _ in range(3)]
    norm = [torch.ones(32, device="cuda"), torch.zeros(32, device="cuda")]
    for columns in (torch.zeros(10, 1), torch.zeros(9), torch.zeros(())):
        given = columns.int().cuda()
        with pytest.raises(RuntimeError, match=r"position_ids must have shape \[10\]"):
            ops.embedding_layer_norm(ids, ids, given, cu, *tables, *norm, 1e-12)
    with pytest.raises(RuntimeError, match="batch and seqlen must not be negative"):
        ops.restore_padding(qkv, ids, -1, 10, 0.0)
    wide = torch.zeros(1, dtype=torch.int64, device="cuda").expand(2**16, 2**15)
    with pytest.raises(RuntimeError, match=r"fewer than 2\^31 tokens"):
        ops.remove_padding(wide, wide, wide)


def test_products_that_do_not_fit_are_refused() -> None:
    ops = torch.ops.fastertransformer

    def there(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    x, weight, row, rest = there(5, 64), there(128, 64), there(128), there(5, 128)
    fits = (x, weight, row, rest, row, row)
    before = ops.linear_layer_norm(*fits, 1e-12)
    for at, good in enumerate(fits):
        for wrong in (good.cpu(), good.double(), good[..., :-1].contiguous(), good[None, None]):
            given = [*fits[:at], wrong, *fits[at + 1 :]]
            with pytest.raises(RuntimeError, match=r" must | is on another device"):
                ops.linear_layer_norm(*given, 1e-12)
            if at < 4:
                with pytest.raises(RuntimeError, match=r" must | is on another device"):
                    ops.linear(*given[:4], "gelu")
    assert torch.equal(ops.linear_layer_norm(*fits, 1e-12), before)
    for rows in (-1, 2**31):
        with pytest.raises(RuntimeError, match="rows is out of range"):
            ops.gemm_candidates(weight, rows, False, False, False)
        with pytest.raises(RuntimeError, match="rows is out of range"):
            ops.gemm_row_class(rows)
    with pytest.raises(RuntimeError, match="weight must"):
        ops.gemm_candidates(weight.int(), 5, False, False, False)
    with pytest.raises(RuntimeError, match="unknown dtype"):
        ops.load_gemm_plan(0, "float8", 5, 128, 64, False, False, False, "cublaslt")
    with pytest.raises(RuntimeError, match="device is out of range"):
        ops.load_gemm_plan(-1, "float16", 5, 128, 64, False, False, False, "cublaslt")


def test_row_classes_end() -> None:
    row_class = torch.ops.fastertransformer.gemm_row_class
    for rows in (1, 33, 2**20 + 1, 2**30, 2**30 + 1, 2**31 - 1):
        assert rows <= row_class(rows) <= 2**31 - 1
