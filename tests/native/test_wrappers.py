"""Schemas, fake kernels and wrappers of the ops, by torch's own checker."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from op_arguments import HIDDEN, INNER, NAMES, OLD_NAMES, TOKENS, UNTRACEABLE, arguments, normal

from ft_handler.native import ops, twins


@pytest.mark.parametrize("name", NAMES + OLD_NAMES)
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.fastertransformer, name).default
    checks = ["test_schema", "test_autograd_registration"]
    if name not in UNTRACEABLE:  # they return a plain number, which cannot be traced
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, arguments(name, ops.prepare_weight), test_utils=checks)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "prepare_weight"])
def test_wrappers_agree_with_their_twins(name: str) -> None:
    found = getattr(ops, name)(*arguments(name, ops.prepare_weight))
    wanted = getattr(twins, name)(*arguments(name, twins.prepare_weight))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class _Malloc(ctypes.Structure):
    """What glibc's mallinfo2 tells; `uordblks` is how many bytes are in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.parametrize("name", NAMES)
def test_a_call_keeps_no_memory(name: str) -> None:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("glibc older than 2.33")
    mallinfo.restype = _Malloc
    op = getattr(torch.ops.fastertransformer, name).default
    given = arguments(name, ops.prepare_weight)
    calls = 200

    def kept() -> float:
        before = mallinfo().uordblks
        for _ in range(calls):
            op(*given)
        return (mallinfo().uordblks - before) / calls

    kept()  # what is set up once
    # Of several rounds the least: other threads of this process may allocate meanwhile.
    assert min(kept() for _ in range(3)) < 16


def test_the_library_registers_nothing_without_a_twin() -> None:
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name for s in schemas if s.name.startswith("fastertransformer::")}
    assert registered - {"fastertransformer::build_info"} >= {
        f"fastertransformer::{n}" for n in NAMES + OLD_NAMES
    }
    for name in NAMES:
        assert callable(getattr(twins, name))
        assert callable(getattr(ops, name))


def test_attention_without_a_relative_bias_compiles() -> None:
    op = torch.ops.fastertransformer.varlen_attention.default
    *call, _ = arguments("varlen_attention", ops.prepare_weight)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, tuple(call), test_utils=checks)
    torch.testing.assert_close(ops.varlen_attention(*call), twins.varlen_attention(*call))


def test_linear_without_bias_and_residual_compiles() -> None:
    weight = ops.prepare_weight(normal(INNER, HIDDEN))
    op = torch.ops.fastertransformer.linear.default
    utilities = ("test_schema", "test_faketensor")
    for bias, residual in ((None, None), (None, normal(TOKENS, INNER))):
        call = (normal(TOKENS, HIDDEN), weight, bias, residual, "gelu")
        torch.library.opcheck(op, call, test_utils=utilities)
