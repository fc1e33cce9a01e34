"""Calls with arguments that lie, in a process of their own: a wild address would lose the context.

`python lying_arguments.py CASE` exits non-zero, in words, where a call reads or writes what it must
not, or answers with memory that nobody wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from stacks import VOCABULARY, narrow_stack, random_stack, specification
from torch import Tensor

from ft_handler import load_library

STALE = 123.0
# Hidden, heads, intermediate.
SIZES = ((768, 12, 3072), (256, 4, 1024), (192, 6, 320))
load_library()
ops = torch.ops.fastertransformer


def leave_stale_memory() -> None:
    """Fills what the allocator hands out next with a number that no call computes."""
    pieces = [torch.full((n,), STALE, device="cuda") for n in (1 << 12, 1 << 18, 1 << 22, 1 << 25)]
    torch.cuda.synchronize()
    del pieces


def bounds(values: Sequence[int]) -> Tensor:
    """cu_seqlens, whatever they say."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def lies(tokens: int, longest: int) -> dict[str, tuple[list[int], int]]:
    """cu_seqlens and max_seqlen for `tokens` rows, none of which fit."""
    half, big = tokens // 2, 2**31 - 1
    return {
        "understated": ([0, half, tokens], half - 1),
        "far understated": ([0, tokens], 1),
        "descending": ([0, half, half // 2, tokens], longest),
        "late start": ([3, half, tokens], longest),
        "negative start": ([-7, half, tokens], longest),
        "past the end": ([0, half, tokens + 1], longest),
        "far past the end": ([0, half, big], big),
        "past the end between": ([0, tokens + 50, tokens], longest),
        "overflow": ([0, big, -2, tokens], big),
        "negative end": ([0, half, -tokens], longest),
    }


def spoilt(what: str, call: Callable[[Tensor, int], Tensor], tokens: int, longest: int) -> None:
    """Every lie makes every row NaN or zero, and the truth is told as before."""
    true = bounds([0, tokens // 2, tokens])
    before = call(true, longest)
    for lie, (values, most) in lies(tokens, longest).items():
        leave_stale_memory()
        out = call(bounds(values), most)
        torch.cuda.synchronize()
        assert (out.isnan() | (out == 0)).all(), f"{what}: {lie}"
        assert out.isnan().any() or values[-1] < 0, f"{what}: {lie}"
    assert torch.equal(call(true, longest), before), f"{what}: afterwards"


def stray(what: str, call: Callable[[Tensor, int], Tensor], tokens: int, longest: int) -> None:
    """Rows past the last sequence depend on nothing that was in memory."""
    short = bounds([0, tokens // 2, tokens - tokens // 4])
    first = call(short, longest)
    leave_stale_memory()
    assert torch.equal(call(short, longest), first), f"{what}: stray rows"


def relative_bias(heads: int, distance: int, dtype: torch.dtype) -> Tensor:
    """A bias by head and distance."""
    return torch.randn(heads, 2 * distance + 1, device="cuda", dtype=dtype)


def paddings() -> None:
    """Indices outside of the padded rows are left out; what is not placed is filled."""
    for dtype in (torch.float16, torch.float32):
        for width in (1, 6, 768):
            rows = torch.randn(9, width, device="cuda", dtype=dtype)
            right = torch.tensor([0, 3, 7, 11], device="cuda")
            wild = torch.tensor([-1, 12, 2**31, 2**62, -(2**63)], device="cuda")
            leave_stale_memory()
            out = ops.restore_padding(rows, torch.cat([wild, right]), 3, 4, -1.0)
            wanted = torch.full((12, width), -1.0, device="cuda", dtype=dtype)
            wanted[right] = rows[len(wild) :]
            assert torch.equal(out.view(12, width), wanted), f"{dtype} {width}"


def pools() -> None:
    """Means and maxima of rows, at widths that are read in pieces and one by one."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for hidden in (30, 768):
            for how in ("mean", "max"):
                x = torch.randn(200, hidden, device="cuda", dtype=dtype)

                def call(cu: Tensor, given: tuple[Any, ...] = (x, how)) -> Tensor:
                    out: Tensor = ops.segment_pool(given[0], cu, given[1])
                    return out

                before = call(bounds([0, 100, 200]))
                for lie, (values, _) in lies(200, 200).items():
                    if "understated" in lie:  # a pool is told no longest length
                        continue
                    leave_stale_memory()
                    assert call(bounds(values)).isnan().all(), f"{dtype} {hidden} {how}: {lie}"
                assert torch.equal(call(bounds([0, 100, 200])), before)


def attention() -> None:
    """The attention kernels: packed and streaming, with wgmma, mma and neither."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (6, 32, 48, 64, 128):
            # With 100 heads there are more tiles than run at once, which has a kernel of its own.
            for tokens, longest, heads in (
                (50, 40, 2),
                (200, 110, 2),
                (900, 600, 2),
                (200, 110, 100),
                (900, 600, 100),
            ):
                qkv = torch.randn(tokens, 3 * heads * head_dim, device="cuda", dtype=dtype)

                for distance in (None, 40) if heads == 2 else (None,):
                    bias = None if distance is None else relative_bias(heads, distance, dtype)

                    def call(
                        cu: Tensor, most: int, given: tuple[Any, ...] = (qkv, heads, bias)
                    ) -> Tensor:
                        out: Tensor = ops.varlen_attention(given[0], cu, most, *given[1:])
                        return out

                    what = f"attention {dtype} {head_dim} {tokens} {heads} {distance}"
                    spoilt(what, call, tokens, longest)
                    stray(what, call, tokens, longest)
                    tail = call(bounds([0, tokens // 2]), longest)[tokens // 2 :]
                    assert not tail.any(), what


def encoder(what: str, stack: list[Tensor], spec: str, tokens: int, most: int, how: str) -> None:
    """One encoder over one batch."""
    ids = torch.randint(0, VOCABULARY, (tokens,), device="cuda")

    def call(cu: Tensor, longest: int) -> Tensor:
        out: Tensor = ops.encode(ids, ids % 2, None, cu, longest, stack, spec, how)
        return out

    what = f"encode {what} {tokens} {how}"
    spoilt(what, call, tokens, most)
    stray(what, call, tokens, most)


def encoders() -> None:
    """The whole encoder, by the chain for few tokens and by the large kernels."""
    for dtype in (torch.float16, torch.bfloat16):
        for size in SIZES:
            stack, spec = random_stack(size, dtype, positions=1024), specification(size)
            for tokens, longest, options in (
                (24, 20, ""),
                (64, 60, ""),
                (64, 60, "few_tokens=0"),
                (700, 500, ""),
                (64, 60, "batch_invariant"),
            ):
                encoder(f"{dtype} {size}", stack, spec, tokens, longest, options)


def narrow_encoders() -> None:
    """The whole encoder with e4m3 weights, at counts of tokens that do without them and do not."""
    for size in SIZES:
        for floats in ("", "qkv:1;down:0,2"):
            stack, spec = narrow_stack(size, floats, positions=3000)
            for tokens, longest, options in (
                (24, 20, ""),
                (700, 500, ""),
                (5000, 2600, ""),
                (5000, 2600, "batch_invariant"),
            ):
                encoder(f"fp8 {size} {floats}", stack, spec, tokens, longest, options)


def embeddings() -> None:
    """Ids, types and positions outside their tables make their rows NaN and no others."""
    for hidden in (30, 768):
        tables = [torch.randn(n, hidden, device="cuda") for n in (50, 40, 2)]
        norm = [torch.ones(hidden, device="cuda"), torch.zeros(hidden, device="cuda")]
        ids = torch.randint(0, 50, (30,), device="cuda")
        types, cu = ids % 2, bounds([0, 12, 30])
        columns = torch.arange(30, device="cuda", dtype=torch.int32)
        good = ops.embedding_layer_norm(ids, types, columns, cu, *tables, *norm, 1e-12)
        for wild in (-1, 50, 2**40):
            for spoil in range(3):
                given = [ids.clone(), types.clone(), columns.clone()]
                given[spoil][7] = wild if spoil < 2 else min(wild, 2**31 - 1)
                out = ops.embedding_layer_norm(*given, cu, *tables, *norm, 1e-12)
                assert out[7].isnan().all()
                out[7] = good[7]
                assert torch.equal(out, good)
        for values in ([5, 12, 30], [-5, -3, 30]):
            out = ops.embedding_layer_norm(ids, types, None, bounds(values), *tables, *norm, 1e-12)
            assert out[0].isnan().all(), values


def off(tensor: Tensor) -> Tensor:
    """The same numbers one element past an aligned place."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


def misaligned() -> None:
    """Arguments off 16 bytes answer what aligned ones do."""

    def same(op: Callable[..., Tensor], *arguments: Any) -> None:
        moved = [
            off(a)
            if isinstance(a, Tensor)
            else [off(one) for one in a]
            if isinstance(a, list)
            else a
            for a in arguments
        ]
        assert torch.equal(op(*moved), op(*arguments)), op

    for dtype in (torch.float16, torch.bfloat16, torch.float32):

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=dtype)

        x, w, b, r = normal(40, 64), normal(128, 64), normal(128), normal(40, 128)
        same(ops.linear, x, w, b, r, "")
        same(ops.linear, x, w, b, r, "gelu")
        same(ops.linear_layer_norm, x, w, b, r, b, b, 1e-12)
        same(ops.bias_activation, r, b, "gelu")
        same(ops.residual_layer_norm, r, b, r, b, b, 1e-12)
        same(ops.varlen_attention, normal(40, 192), bounds([0, 13, 40]), 30, 2)
        biased = (normal(40, 192), bounds([0, 13, 40]), 30, 2, normal(2, 21))
        same(ops.varlen_attention, *biased)
        same(ops.segment_pool, r, bounds([0, 13, 40]), "mean")
        indices = torch.arange(40, device="cuda")
        same(ops.restore_padding, r, indices, 5, 8, -1.0)
        for size in ((768, 12, 3072), (192, 6, 320)):
            stack = random_stack(size, dtype)
            for tokens in (30, 90, 400):
                ids = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
                cu = bounds([0, *range(30, tokens + 1, 30), *([tokens] if tokens % 30 else [])])
                spec = specification(size)
                same(ops.encode, ids, ids % 2, None, cu, 30, stack, spec, "")
            if size[0] == 768:
                same(ops.encode, ids, ids % 2, ids.int() % 90, cu, 30, stack, spec, "")
    for size in SIZES:
        stack, spec = narrow_stack(size)
        for tokens in (30, 400, 5010):
            ids = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
            cu = bounds([0, *range(30, tokens + 1, 30), *([tokens] if tokens % 30 else [])])
            same(ops.encode, ids, ids % 2, None, cu, 30, stack, spec, "")
    # torch compares no 8-bit floats.
    weight = torch.randn(2, 24, 48, device="cuda").to(torch.float8_e4m3fn)
    prepared = [ops.prepare_narrow(w).view(torch.int8) for w in (weight, off(weight))]
    assert torch.equal(*prepared)


CASES = {
    "attention": attention,
    "encoders": encoders,
    "embeddings": embeddings,
    "misaligned": misaligned,
    "narrow_encoders": narrow_encoders,
    "paddings": paddings,
    "pools": pools,
}

if __name__ == "__main__":
    torch.manual_seed(1)
    CASES[sys.argv[1]]()
