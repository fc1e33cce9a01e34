"""int8 weights on the CPU against a plain simulation of the documented scheme.

`test_every_instruction_set` runs this file once more for each other instruction set that the
processor has.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_support import GEMM_WEIGHTS, random_weights
from torch import Tensor

import ft_handler
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins

ft_handler.load_library()
ops = torch.ops.fastertransformer

LENGTHS = [1, 7, 113, 511]
LEVELS = {"avx2": 64, "avx512": 64}.get(json.loads(ops.build_info())["cpu_isa"], 127)
NONE = torch.empty(0)


def slice_length(depth: int) -> int:
    """Columns of a slice: as few slices of at most 512 as fit, of equal multiples of 64."""
    slices = math.ceil(depth / 512)
    return math.ceil(math.ceil(depth / slices) / 64) * 64


def multiplied(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The documented scheme: `x [T,K]` in fp32 by int8 `[N,K]` with a scale a row."""
    total = torch.zeros(x.shape[0], weight.shape[0])
    step = slice_length(x.shape[1])
    levels = torch.tensor(float(LEVELS))
    for start in range(0, x.shape[1], step):
        part = x[:, start : start + step].float()
        most = part.abs().amax(1, keepdim=True)
        small = most < 2.0**-100
        rounded = torch.where(small, torch.zeros(()), (part * (levels / most)).round())
        worth = torch.where(small, torch.zeros(()), most / levels)
        worth = torch.where(most.isfinite(), worth, torch.nan)
        rounded = torch.where(most.isfinite(), rounded, torch.zeros(()))
        whole = rounded.double() @ weight[:, start : start + step].double().T
        total += whole.float() * worth
    return total * scale


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[...,N,K]` to int8 and a scale a row."""
    scale = weight.float().abs().amax(-1) / 127
    return (weight.float() / scale[..., None]).round().to(torch.int8), scale


def prepared(weight: Tensor, scale: Tensor) -> Tensor:
    """One layer, nothing kept."""
    blob: Tensor = ops.prepare_layers(weight[None], scale[None], NONE, [])
    return blob


# ---- linear -------------------------------------------------------------------------------------

SHAPES = [(50, 66), (97, 160), (130, 420), (800, 64), (96, 768), (64, 3072), (33, 1025)]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(tokens: int, n: int, k: int) -> None:
    x, bias, residual = torch.randn(tokens, k), torch.randn(n), torch.randn(tokens, n)
    weight, scale = quantised(torch.randn(n, k))
    got = ops.linear(x, prepared(weight, scale), bias, residual, "gelu")
    want = F.gelu(multiplied(x, weight, scale) + bias) + residual
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype: torch.dtype) -> None:
    x = torch.randn(29, 600).to(dtype)
    weight, scale = quantised(torch.randn(70, 600) * 0.05)
    got = ops.linear(x, prepared(weight, scale), None, None)
    want = multiplied(x, weight, scale)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("weights", ["most", "least", "signs", "turns"])
@pytest.mark.parametrize("inputs", ["ones", "minus ones", "signs", "turns"])
def test_the_largest_products_do_not_saturate(weights: str, inputs: str) -> None:
    turns = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    columns = torch.arange(520)

    def drawn(kind: str, rows: int) -> Tensor:
        if kind == "turns":
            return turns[columns % 8].expand(rows, -1)
        if kind == "signs":
            return torch.randint(0, 2, (rows, 520)) * 2.0 - 1
        return torch.full((rows, 520), 1.0 if kind in ("most", "ones") else -1.0)

    x, weight = drawn(inputs, 13), (drawn(weights, 50) * 127).to(torch.int8)
    got = ops.linear(x, prepared(weight, torch.ones(50)), None, None)
    torch.testing.assert_close(got, x @ weight.float().T, rtol=1e-6, atol=1e-2)


def test_zeros_and_what_is_not_finite_stay_in_their_rows() -> None:
    x = torch.randn(40, 700)
    weight, scale = quantised(torch.randn(33, 700))
    blob = prepared(weight, scale)
    want = ops.linear(x, blob, None, None)
    x[3] = 0
    x[5, 600], x[7, 0], x[9, 699] = torch.nan, torch.inf, -torch.inf
    x[11] = 1e-38
    got = ops.linear(x, blob, None, None)
    assert (got[3] == 0).all()
    assert (got[11] == 0).all()
    assert got[[5, 7, 9]].isnan().all()
    others = [i for i in range(40) if i not in (3, 5, 7, 9, 11)]
    assert torch.equal(got[others], want[others])


def test_a_row_does_not_see_its_batch_or_the_threads() -> None:
    x = torch.randn(311, 1000)
    weight, scale = quantised(torch.randn(900, 1000))
    blob = prepared(weight, scale)
    whole = ops.linear(x, blob, None, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.linear(x, blob, None, None), whole)
    finally:
        torch.set_num_threads(threads)
    for row in (0, 5, 144, 310):
        assert torch.equal(ops.linear(x[row : row + 1], blob, None, None), whole[row : row + 1])


# ---- prepare_layers -----------------------------------------------------------------------------


def test_prepared_layers_know_what_they_are() -> None:
    weight, scale = quantised(torch.randn(2, 40, 70))
    kept = torch.randn(3, 40, 70)
    blob = ops.prepare_layers(weight, scale, kept, [0, 2, 4])
    assert ops.is_prepared(blob, weight)
    assert ops.is_prepared(blob, kept)
    assert not ops.is_prepared(blob, kept.half())
    assert not ops.is_prepared(blob, weight[:1])
    assert not ops.is_prepared(blob, weight[:, :39])
    assert not ops.is_prepared(blob[:-64], weight)
    alone = ops.prepare_layers(torch.empty(0, 40, 70, dtype=torch.int8), NONE, kept, [0, 1, 2])
    assert torch.equal(alone, ops.prepare_weight(kept))
    assert blob.numel() < weight.numel() * 1.6 + kept.numel() * 4 + 8192


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantized": torch.zeros(2, 4, 6)}, "quantized must have dtype int8"),
        ({"scale": torch.ones(2, 5)}, r"scale must have shape \[2, 4\], has \[2, 5\]"),
        ({"scale": torch.ones(2, 4).double()}, "scale must have dtype float32"),
        ({"kept": torch.zeros(1, 4, 5)}, r"kept must have shape \[1, 4, 6\]"),
        ({"kept": torch.zeros(1, 4, 6).int()}, "kept must have dtype float32, float16 or bfloat16"),
        ({"kept_layers": []}, "kept_layers must have an index for each of kept"),
        ({"kept_layers": [3]}, r"kept_layers must increase within \[0, 3\), has 3 at 0"),
        ({"kept_layers": [-1]}, r"kept_layers must increase within \[0, 3\), has -1 at 0"),
        ({"quantized": NONE, "kept": NONE, "kept_layers": []}, "one of them with L > 0"),
    ],
)
def test_prepare_layers_refuses(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {
        "quantized": torch.ones(2, 4, 6, dtype=torch.int8),
        "scale": torch.ones(2, 4),
        "kept": torch.zeros(1, 4, 6),
        "kept_layers": [1],
    }
    with pytest.raises(RuntimeError, match=words):
        ops.prepare_layers(*{**given, **change}.values())


# ---- the encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_encoder_of_mixed_layers(dtype: torch.dtype) -> None:
    spec = EncoderSpec(
        hidden_size=64,
        embedding_size=64,
        num_layers=3,
        num_heads=2,
        intermediate_size=200,
        activation="gelu",
        layer_norm_eps=1e-12,
        relative_distance=0,
    )
    raw = random_weights(spec, dtype, stored=3)
    keep = {"layers.qkv.weight": [0], "layers.up.weight": [1, 2], "layers.down.weight": [0, 1, 2]}
    weights, seen = {}, {}
    for name, tensor in raw.items():
        seen[name] = tensor.float()
        weights[name] = tensor
        if name not in GEMM_WEIGHTS:
            continue
        kept = keep.get(name, [])
        rest = [i for i in range(tensor.shape[0]) if i not in kept]
        ints, scale = quantised(tensor[rest])
        weights[name] = ops.prepare_layers(ints, scale, tensor[kept], kept)
        seen[name][rest] = ints.float() * scale[..., None]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    tokens = sum(LENGTHS)
    ids, types = torch.randint(0, 30, (tokens,)), torch.randint(0, 2, (tokens,))

    def run(first: int, last: int) -> Tensor:
        start, end = int(cu_seqlens[first]), int(cu_seqlens[last])
        bounds = cu_seqlens[first : last + 1] - start
        inputs = (ids[start:end], types[start:end], None, bounds.to(torch.int32), max(LENGTHS))
        hidden: Tensor = ops.encode(*inputs, list(weights.values()), spec.text(weights), "")
        return hidden

    whole = run(0, len(LENGTHS))
    want = twins.encode(
        ids, types, None, cu_seqlens, max(LENGTHS), list(seen.values()), spec.text(seen), ""
    )
    error = (whole.float() - want).abs()
    assert error.max() < 0.2
    assert error.mean() < 0.02
    for i in range(len(LENGTHS)):
        start, end = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
        assert torch.equal(run(i, i + 1), whole[start:end])


def test_every_instruction_set() -> None:
    if os.environ.get("FT_HANDLER_CPU_ISA"):
        pytest.skip("one instruction set is forced")
    for isa in json.loads(ops.build_info())["cpu_isas"][1:]:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "FT_HANDLER_CPU_ISA": isa},
            capture_output=True,
            text=True,
            timeout=500,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, f"{isa}:\n{done.stdout[-4000:]}"
