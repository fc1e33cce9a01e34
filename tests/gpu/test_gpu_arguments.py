"""What the ops on the GPU make of arguments that lie, and torch's own checks of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_arguments import NAMES, OLD_NAMES, UNTRACEABLE, arguments

import ft_handler.native.ops  # noqa: F401 - loads the library, and what its ops make of fake tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", ["attention", "encoders", "embeddings", "misaligned", "pools"])
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


def test_row_classes_end() -> None:
    row_class = torch.ops.fastertransformer.gemm_row_class
    for rows in (1, 33, 2**20 + 1, 2**30, 2**30 + 1, 2**31 - 1):
        assert rows <= row_class(rows) <= 2**31 - 1
