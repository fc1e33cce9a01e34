"""Every CPU op against its eager twin, at awkward shapes, in every float type.

`test_every_instruction_set` runs this file once more for each other instruction set that the
processor has, so everything here holds for all of them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_support import GEMM_WEIGHTS, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ft_handler
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins

ft_handler.load_library()
ops = torch.ops.fastertransformer

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# fp32 sums in another order than the twin's; half types round inputs and outputs.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
LENGTHS = [1, 7, 113, 511]
ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu"]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Equal to within the type's bound, relative above 1 and absolute below."""
    assert got.dtype == dtype
    bound = BOUNDS[dtype]
    torch.testing.assert_close(got.float(), want, rtol=bound, atol=bound)


def bounds_of(lengths: list[int]) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def encoder_inputs(
    dtype: torch.dtype,
    lengths: list[int],
    heads: int = 2,
    head_dim: int = 32,
    inner: int = 72,
    embedding: int | None = None,
    stored: int = 2,
    activation: str = "gelu",
    distance: int = 0,
) -> dict[str, Any]:
    """Random arguments of `encode`, raw weights, two layers; `stored` 1: the layers share them."""
    hidden, tokens = heads * head_dim, sum(lengths)
    spec = EncoderSpec(
        hidden_size=hidden,
        embedding_size=embedding or hidden,
        num_layers=2,
        num_heads=heads,
        intermediate_size=inner,
        activation=activation,
        layer_norm_eps=1e-12,
        relative_distance=distance,
    )
    weights = random_weights(spec, dtype, stored=stored)
    return {
        "input_ids": torch.randint(0, 30, (tokens,)),
        "token_type_ids": torch.randint(0, 2, (tokens,)),
        "position_ids": None,
        "cu_seqlens": bounds_of(lengths),
        "max_seqlen": max(lengths, default=0),
        "weights": list(weights.values()),
        "spec": spec.text(weights),
        "options": "",
    }


def names_of(inputs: dict[str, Any]) -> list[str]:
    """The names of `weights`."""
    names: list[str] = inputs["spec"].split("weights=")[1].split(",")
    return names


def named(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The weights by name."""
    return dict(zip(names_of(inputs), inputs["weights"], strict=True))


def prepared(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with the weights as the op wants them."""
    weights = [
        ops.prepare_weight(tensor) if name in GEMM_WEIGHTS else tensor
        for name, tensor in named(inputs).items()
    ]
    return {**inputs, "weights": weights}


def encode(inputs: dict[str, Any]) -> Tensor:
    """What the op answers to prepared arguments."""
    hidden: Tensor = ops.encode(*inputs.values())
    return hidden


# ---- linear -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "n", "k"), [(1, 1, 2), (7, 50, 66), (113, 97, 160), (300, 130, 420), (150, 800, 64)]
)
def test_linear(dtype: torch.dtype, tokens: int, n: int, k: int) -> None:
    x, w = torch.randn(tokens, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    bias, residual = torch.randn(n).to(dtype), torch.randn(tokens, n).to(dtype)
    weight = ops.prepare_weight(w)
    for b in (None, bias):
        for r in (None, residual):
            for activation in ("", *ACTIVATIONS):
                got = ops.linear(x, weight, b, r, activation)
                close(got, twins.linear(x, w, b, r, activation), dtype)


def test_linear_reads_strided_inputs() -> None:
    x, w, residual = torch.randn(48, 20).T, torch.randn(30, 48), torch.randn(30, 20).T
    got = ops.linear(x, ops.prepare_weight(w.T.contiguous().T), None, residual)
    close(got, twins.linear(x, w, None, residual), torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_prepared_weight_is_about_as_large_as_the_raw_one(dtype: torch.dtype) -> None:
    w = torch.zeros(3, 384, 384, dtype=dtype)
    assert ops.prepare_weight(w).numel() <= w.numel() * w.element_size() + 4096


def test_linear_refuses_what_was_not_prepared() -> None:
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="weight must be what prepare_weight returned"):
        ops.linear(x, w, None, None)
    blob = ops.prepare_weight(w)
    with pytest.raises(RuntimeError, match="weight is not what prepare_weight returned"):
        ops.linear(x, torch.zeros_like(blob), None, None)
    with pytest.raises(RuntimeError, match="weight has the wrong size"):
        ops.linear(x, blob[:-64], None, None)
    with pytest.raises(RuntimeError, match=r"weight must hold 1 x \[-1, 9\]"):
        ops.linear(torch.randn(3, 9), blob, None, None)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[4\], has \[5\]"):
        ops.linear(x, blob, torch.randn(5), None)
    with pytest.raises(RuntimeError, match=r'activation must be .*is "tanh"; install'):
        ops.linear(x, blob, None, None, "tanh")
    with pytest.raises(RuntimeError, match=r"input must have dtype float32.*float64"):
        ops.linear(x.double(), blob, None, None)


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [2, 6, 32, 48, 64, 80, 128])
def test_attention_head_sizes(dtype: torch.dtype, head_dim: int) -> None:
    lengths = [1, 7, 0, 113, 32]
    qkv = torch.randn(sum(lengths), 3 * 3 * head_dim).to(dtype)
    got = ops.varlen_attention(qkv, bounds_of(lengths), 113, 3)
    close(got, twins.varlen_attention(qkv, bounds_of(lengths), 113, 3), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [*LENGTHS, 1100])
def test_attention_lengths(dtype: torch.dtype, length: int) -> None:
    qkv = (torch.randn(length, 3 * 64) * 2).to(dtype)
    got = ops.varlen_attention(qkv, bounds_of([length]), 4096, 2)
    close(got, twins.varlen_attention(qkv, bounds_of([length]), 4096, 2), dtype)


def bias_of(heads: int, distance: int, dtype: torch.dtype) -> Tensor:
    """A random relative bias, large enough for one at the wrong place to show."""
    return (torch.randn(heads, 2 * distance + 1) * 2).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [6, 32, 64])
@pytest.mark.parametrize("distance", [0, 1, 16, 127, 600])
def test_a_relative_bias(dtype: torch.dtype, head_dim: int, distance: int) -> None:
    """Distances that all occur, that are cut off, and that no sequence reaches."""
    bias = bias_of(3, distance, dtype)
    for lengths in ([1], [7], [113], [511], [5, 0, 113, 40, 1], []):
        cu, most = bounds_of(lengths), max(lengths, default=0)
        qkv = torch.randn(sum(lengths), 3 * 3 * head_dim).to(dtype)
        got = ops.varlen_attention(qkv, cu, most, 3, bias)
        close(got, twins.varlen_attention(qkv, cu, most, 3, bias), dtype)


def test_a_relative_bias_by_hand() -> None:
    # Keys and queries are zero, values are places; every key but the one behind is out of reach.
    qkv = torch.zeros(6, 6)
    qkv[:, 4] = torch.arange(6.0)
    bias = torch.tensor([[-1e4, -1e4, 0.0, 1e4, -1e4]])
    got = ops.varlen_attention(qkv, bounds_of([2, 4]), 4, 1, bias)
    assert got[:, 0].tolist() == [1, 1, 3, 4, 5, 5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_relative_bias_does_not_see_the_batch(dtype: torch.dtype) -> None:
    qkv, bias = torch.randn(700, 96).to(dtype), bias_of(2, 30, dtype)
    alone = ops.varlen_attention(qkv[20:83], bounds_of([63]), 63, 2, bias)
    among = ops.varlen_attention(qkv, bounds_of([20, 63, 617]), 617, 2, bias)
    assert torch.equal(among[20:83], alone)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bias_of_zeros_is_none(dtype: torch.dtype) -> None:
    qkv, cu = torch.randn(150, 96).to(dtype), bounds_of([37, 113])
    got = ops.varlen_attention(qkv, cu, 113, 1, torch.zeros(1, 9, dtype=dtype))
    close(got, ops.varlen_attention(qkv, cu, 113, 1).float(), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_relative_bias_that_is_not_finite(dtype: torch.dtype, value: float) -> None:
    """Minus infinity hides keys, as in torch; a row that nothing is left of is NaN."""
    for length in (1, 5, 45):
        qkv, cu = torch.randn(length, 3 * 64).to(dtype), bounds_of([length])
        for column in (0, 3, 6):
            bias = bias_of(2, 3, dtype)
            bias[1, column] = value
            got = ops.varlen_attention(qkv, cu, length, 2, bias)
            want = twins.varlen_attention(qkv, cu, length, 2, bias)
            assert torch.equal(got.isnan(), want.isnan())
            close(got[want.isfinite()], want[want.isfinite()], dtype)


def test_relative_biases_that_do_not_fit_are_refused() -> None:
    qkv, cu = torch.randn(10, 96), bounds_of([10])
    for bias, shape in (
        (torch.zeros(2, 4), r"\[2, 4\]"),
        (torch.zeros(3, 5), r"\[3, 5\]"),
        (torch.zeros(2, 0), r"\[2, 0\]"),
        (torch.zeros(5), r"\[5\]"),
        (torch.zeros(1, 2, 5), r"\[1, 2, 5\]"),
    ):
        message = r"relative_bias must have shape \[2, 2 D \+ 1\], has " + shape
        with pytest.raises(RuntimeError, match=message):
            ops.varlen_attention(qkv, cu, 10, 2, bias)
    with pytest.raises(RuntimeError, match=r"relative_bias must have dtype float32.*float64"):
        ops.varlen_attention(qkv, cu, 10, 2, torch.zeros(2, 5, dtype=torch.float64))
    strided = torch.randn(5, 2).T
    got = ops.varlen_attention(qkv, cu, 10, 2, strided)
    assert torch.equal(got, ops.varlen_attention(qkv, cu, 10, 2, strided.contiguous()))


def test_attention_of_large_scores_stays_finite() -> None:
    qkv = torch.randn(40, 96) * 60
    got = ops.varlen_attention(qkv, bounds_of([40]), 40, 1)
    want = twins.varlen_attention(qkv, bounds_of([40]), 40, 1)
    # Scores near 10^4 carry a rounding error of 10^-3, whoever computes them.
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_attention_keeps_sequences_apart(dtype: torch.dtype) -> None:
    qkv = torch.randn(60, 96).to(dtype)
    alone = ops.varlen_attention(qkv[20:33], bounds_of([13]), 13, 2)
    qkv[:20], qkv[33:] = float("nan"), float("inf")
    among = ops.varlen_attention(qkv, bounds_of([20, 13, 27]), 27, 2)
    assert torch.equal(among[20:33], alone)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [6, 32, 80])
@pytest.mark.parametrize("part", ["queries", "keys", "values"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_reaches_its_sequence_and_no_other(
    dtype: torch.dtype, head_dim: int, part: str, value: float
) -> None:
    """One number, at the first, a middle and the last token: what torch's softmax makes of it."""
    lengths, heads = [20, 45, 27], 2
    clean = torch.randn(sum(lengths), 3 * heads * head_dim).to(dtype)
    before = ops.varlen_attention(clean, bounds_of(lengths), 45, heads)
    place = ("queries", "keys", "values").index(part) * heads * head_dim
    for row in (20, 37, 64):
        qkv = clean.clone()
        qkv[row, place + head_dim + 1] = value  # of the second head
        got = ops.varlen_attention(qkv, bounds_of(lengths), 45, heads)
        want = twins.varlen_attention(qkv, bounds_of(lengths), 45, heads)
        assert not want.isfinite().all()
        assert torch.equal(got.isfinite(), want.isfinite())
        assert torch.equal(got[:20], before[:20])
        assert torch.equal(got[65:], before[65:])
        close(got[want.isfinite()], want[want.isfinite()], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("length", [1, 13, 40, 41, 67])
def test_rows_of_infinite_scores_are_nan(dtype: torch.dtype, value: float, length: int) -> None:
    qkv = torch.rand(length, 96).to(dtype) + 1
    qkv[:, 32:64] = value
    assert ops.varlen_attention(qkv, bounds_of([length]), length, 1).isnan().all()


def test_attention_refuses() -> None:
    qkv = torch.randn(10, 96)
    for cu, message in (
        ([0, 5, 4, 10], "cu_seqlens must not decrease, goes from 5 to 4 at sequence 1"),
        ([1, 10], "cu_seqlens must begin with 0, begins with 1"),
        ([0, 9], "cu_seqlens must end with the number of tokens, 10, ends with 9"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.varlen_attention(qkv, torch.tensor(cu, dtype=torch.int32), 10, 1)
    cu = bounds_of([10])
    with pytest.raises(RuntimeError, match="max_seqlen must be at least the longest sequence, 10"):
        ops.varlen_attention(qkv, cu, 9, 1)
    with pytest.raises(RuntimeError, match="cu_seqlens must have dtype int32, has int64"):
        ops.varlen_attention(qkv, cu.long(), 10, 1)
    with pytest.raises(RuntimeError, match="num_heads must divide the hidden size 32, is 5"):
        ops.varlen_attention(qkv, cu, 10, 5)
    with pytest.raises(RuntimeError, match="head size must be even and at most 128, is 1"):
        ops.varlen_attention(qkv, cu, 10, 32)
    with pytest.raises(RuntimeError, match="head size must be even and at most 128, is 200"):
        ops.varlen_attention(torch.randn(10, 600), cu, 10, 1)


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [2, 33, 384, 768])
def test_residual_layer_norm(dtype: torch.dtype, width: int) -> None:
    x, r = torch.randn(113, width).to(dtype), torch.randn(width, 113).to(dtype).T
    gamma, beta = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    for bias in (None, torch.randn(width).to(dtype)):
        got = ops.residual_layer_norm(x, bias, r, gamma, beta, 1e-5)
        close(got, twins.residual_layer_norm(x, bias, r, gamma, beta, 1e-5), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_activation(dtype: torch.dtype, activation: str) -> None:
    x, bias = (torch.randn(37, 101) * 3).to(dtype), torch.randn(101).to(dtype)
    for b in (None, bias):
        close(ops.bias_activation(x, b, activation), twins.bias_activation(x, b, activation), dtype)


def test_activations_that_are_refused() -> None:
    x, bias = torch.randn(2, 3), torch.randn(3)
    with pytest.raises(RuntimeError, match=r'gelu, gelu_tanh, relu, silu or none .*"mish"'):
        ops.bias_activation(x, bias, "mish")
    with pytest.raises(ValueError, match="must be gelu, gelu_tanh, relu, silu or an empty name"):
        twins.bias_activation(x, bias, "mish")
    with pytest.raises(RuntimeError, match="activation must be one, is none"):
        ops.bias_activation(x, bias, "")


def gelu_in_double(x: Tensor) -> Tensor:
    """x Phi(x) without a difference of nearly equal numbers."""
    x = x.double()
    return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))


def gelu_bound(want: Tensor, dtype: torch.dtype) -> Tensor:
    """What a result may be off by: 2^-10 of itself (fp32: 2^-13) and its rounding."""
    share = 2.0**-13 if dtype == torch.float32 else 2.0**-10
    return want.abs() * (share + torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bound_of_gelu(dtype: torch.dtype) -> None:
    """Relative to the result, in an epilogue and alone, wherever the result is a normal number."""
    x = torch.cat([torch.linspace(-13.5, 9, 40009), torch.logspace(-6, 4, 997)]).to(dtype)
    want = gelu_in_double(x)
    normal = want.abs() >= max(torch.finfo(dtype).tiny, 2.0**-120)
    assert normal.sum() > 20000
    alone = ops.bias_activation(x[None], None, "gelu")[0]
    weight = ops.prepare_weight(torch.ones(1, 1, dtype=dtype))
    epilogue = ops.linear(x[:, None], weight, None, None, "gelu")[:, 0]
    for got in (alone, epilogue):
        off = (got.double() - want).abs()
        assert (off[normal] <= gelu_bound(want, dtype)[normal]).all()
        # Smaller results: at most the least normal number away.
        assert (off[~normal] <= torch.finfo(dtype).tiny + 2.0**-120).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gelu_of_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([[math.nan, -math.inf, math.inf]], dtype=dtype)
    got = ops.bias_activation(x, None, "gelu")[0]
    assert got.isnan().tolist() == [True, True, False]
    assert got[2] == math.inf


def activated_in_double(x: Tensor, activation: str) -> Tensor:
    """The activations beside erf GELU, without a difference of nearly equal numbers."""
    x = x.double()
    if activation == "relu":
        return torch.relu(x)
    tanh = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    share = torch.exp(-(x if activation == "silu" else tanh).abs())
    return torch.where(x > 0, x, x * share) / (1 + share)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_the_bound_of_the_other_activations(dtype: torch.dtype, activation: str) -> None:
    """2^-16 of the result and its rounding, at every size, in an epilogue and alone."""
    sizes = torch.logspace(-37, 38, 4001)
    x = torch.cat([torch.linspace(-95, 95, 40009), sizes, -sizes, torch.zeros(1)]).to(dtype)
    want = activated_in_double(x, activation)
    assert torch.equal(want.isfinite(), x.isfinite() | (x == -math.inf) & (activation == "relu"))
    x, want = x[x.isfinite()], want[x.isfinite()]
    normal = want.abs() >= max(torch.finfo(dtype).tiny, 2.0**-119)
    assert normal.sum() > 20000
    alone = ops.bias_activation(x[None], None, activation)[0]
    weight = ops.prepare_weight(torch.ones(1, 1, dtype=dtype))
    epilogue = ops.linear(x[:, None], weight, None, None, activation)[:, 0]
    bound = want.abs() * (2.0**-16 + torch.finfo(dtype).eps / 2)
    for got in (alone, epilogue):
        off = (got.double() - want).abs()
        assert (off[normal] <= bound[normal]).all()
        # Smaller results: at most the least of those away.
        assert (off[~normal] <= torch.finfo(dtype).tiny + 2.0**-119).all()
        if dtype == torch.float32:
            assert (off <= 2e-7 * x.double().abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_other_activations_of_zeros_and_of_what_is_not_finite(
    dtype: torch.dtype, activation: str
) -> None:
    x = torch.tensor([math.nan, -math.inf, math.inf, 0.0, -0.0], dtype=dtype)
    want = twins.activated(x, activation)
    weight = ops.prepare_weight(torch.ones(1, 1, dtype=dtype))
    for got in (
        ops.bias_activation(x[None], None, activation)[0],
        ops.linear(x[:, None], weight, None, None, activation)[:, 0],
    ):
        torch.testing.assert_close(got.float(), want, rtol=0, atol=0, equal_nan=True)
    alone = ops.bias_activation(x[None], None, activation)[0]
    assert alone.signbit()[3:].tolist() == want.signbit()[3:].tolist() == [False, True]


def test_gelu_is_exact_to_fp32_rounding() -> None:
    x = torch.cat([torch.linspace(-12, 12, 20011), torch.tensor([0.0, -1e30, 1e30, -1e-30])])
    got = ops.bias_activation(x[None], None, "gelu")[0].double()
    want = F.gelu(x.double())
    assert ((got - want).abs() <= 4e-7 * x.double().abs().clamp(min=1)).all()
    assert torch.isnan(ops.bias_activation(torch.tensor([[float("nan")]]), None, "gelu")).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_embedding_layer_norm(dtype: torch.dtype, ids: torch.dtype) -> None:
    lengths = [5, 1, 0, 40]
    inputs = encoder_inputs(dtype, lengths)
    args = inputs["weights"][:5]
    words, kinds = inputs["input_ids"].to(ids), inputs["token_type_ids"].to(ids)
    cu = inputs["cu_seqlens"]
    for positions in (None, torch.randint(0, 512, (46,), dtype=torch.int32)):
        got = ops.embedding_layer_norm(words, kinds, positions, cu, *args, 1e-12)
        want = twins.embedding_layer_norm(words, kinds, positions, cu, *args, 1e-12)
        close(got, want, dtype)


def test_ids_outside_their_tables_are_refused() -> None:
    inputs = prepared(encoder_inputs(torch.float32, [4, 3]))

    def run(**changed: Any) -> None:
        encode({**inputs, **changed})

    def swap(name: str, tensor: Tensor) -> None:
        weights = list({**named(inputs), name: tensor}.values())
        run(weights=weights)

    for name, token, value, limit in (
        ("input_ids", 2, 30, 30),
        ("input_ids", 6, -1, 30),
        ("token_type_ids", 0, 2, 2),
    ):
        bad = inputs[name].clone()
        bad[token] = value
        message = rf"{name} must be in \[0, {limit}\), has {value} at token {token}"
        with pytest.raises(RuntimeError, match=message):
            run(**{name: bad})
    with pytest.raises(RuntimeError, match=r"position_ids must be in \[0, 512\), has 512"):
        run(position_ids=torch.full((7,), 512, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="must fit the position table of 3"):
        swap("embeddings.position", named(inputs)["embeddings.position"][:3])


def test_weights_that_do_not_fit_the_specification_are_refused() -> None:
    inputs = prepared(encoder_inputs(torch.float32, [4, 3]))

    def swap(name: str, tensor: Tensor) -> None:
        encode({**inputs, "weights": list({**named(inputs), name: tensor}.values())})

    weights = named(inputs)
    with pytest.raises(RuntimeError, match=r"layers.qkv.weight must hold -1 x \[192, 64\]"):
        swap("layers.qkv.weight", weights["layers.out.weight"])
    with pytest.raises(RuntimeError, match=r"layers\.qkv\.weight must hold 2 weights"):
        swap("layers.qkv.weight", ops.prepare_weight(torch.zeros(3, 192, 64)))
    with pytest.raises(RuntimeError, match=r"layers\.up\.weight must be what prepare_weight"):
        swap("layers.up.weight", torch.zeros(2, 72, 64))
    with pytest.raises(RuntimeError, match=r"layers.norm1.bias must have shape \[2, 64\]"):
        swap("layers.norm1.bias", torch.zeros(3, 64))
    with pytest.raises(RuntimeError, match=r"embeddings.word must have shape \[V, 64\]"):
        swap("embeddings.word", torch.zeros(30, 32))
    with pytest.raises(RuntimeError, match=r"position must have the dtype of embeddings\.word"):
        swap("embeddings.position", weights["embeddings.position"].half())
    biased = prepared(encoder_inputs(torch.float32, [4, 3], distance=2))
    encode(biased)
    with pytest.raises(
        RuntimeError,
        match=r"attention\.relative_bias must have shape \[2, 2 D \+ 1\], has \[2, 4\]",
    ):
        encode({**biased, "weights": [*biased["weights"][:-1], torch.zeros(2, 4)]})
    with pytest.raises(RuntimeError, match="weights must be the 17 tensors that spec names, are 1"):
        encode({**inputs, "weights": inputs["weights"][:1]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("eps=", "rotary=1 eps="), 'encoder\'s "rotary=1" is unknown'),
        (("=gelu", "=mish"), 'activation must be gelu, .* or none.*is "mish"'),
        (("up.bias", "gate.bias"), 'weight "layers.gate.bias" is unknown'),
        ((",layers.up.bias", ""), 'lacks the weight "layers.up.bias"'),
        (("heads=2", "heads=5"), "heads must divide its hidden size 64, are 5"),
    ],
)
def test_specifications_of_a_later_library_are_refused(change: tuple[str, str], words: str) -> None:
    inputs = prepared(encoder_inputs(torch.float32, [4, 3]))
    spec = inputs["spec"].replace(*change)
    assert spec != inputs["spec"]
    with pytest.raises(RuntimeError, match=words + ".*install the ft_handler that matches"):
        encode({**inputs, "spec": spec})


def test_options() -> None:
    inputs = prepared(encoder_inputs(torch.float32, [4, 3]))
    want = encode(inputs)
    for options in ("batch_invariant", "batch_invariant=0 few_tokens=0", "few_tokens=1"):
        assert torch.equal(encode({**inputs, "options": options}), want)
    for options, words in (
        ("fast", 'option "fast" is unknown'),
        ("few_tokens=2", "must be 0 or 1"),
    ):
        with pytest.raises(RuntimeError, match=words):
            encode({**inputs, "options": options})


# ---- segments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("width", [1, 33, 64, 384, 770])
def test_segment_pool(dtype: torch.dtype, how: str, width: int) -> None:
    for lengths in ([1], [7], [113], [511], [3, 0, 40, 0], [0, 0, 5], [0], []):
        x, cu = torch.randn(sum(lengths), width).to(dtype), bounds_of(lengths)
        got = ops.segment_pool(x, cu, how)
        assert got.dtype == torch.float32
        assert got.shape == (len(lengths), width)
        assert not got[[length == 0 for length in lengths]].any()
        torch.testing.assert_close(got, twins.segment_pool(x, cu, how), rtol=1e-6, atol=1e-6)
        if how == "max":
            assert torch.equal(got, twins.segment_pool(x, cu, how))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("how", ["mean", "max"])
def test_a_pooled_segment_does_not_see_its_batch(dtype: torch.dtype, how: str) -> None:
    x = torch.randn(700, 384).to(dtype)
    alone = ops.segment_pool(x[20:133], bounds_of([113]), how)[0]
    x[:20], x[133:] = math.nan, math.inf
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            among = ops.segment_pool(x, bounds_of([20, 0, 113, 567, 0, 0]), how)
            assert torch.equal(among[2], alone)
            assert among[0].isnan().all()
            assert not among[[1, 4, 5]].any()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_pooling_what_is_not_finite(how: str) -> None:
    for row in (0, 4, 8):
        x = torch.randn(9, 40)
        x[row, 0], x[row, 17], x[row, 39] = math.nan, math.inf, -math.inf
        got = ops.segment_pool(x, bounds_of([9]), how)
        torch.testing.assert_close(got, twins.segment_pool(x, bounds_of([9]), how), equal_nan=True)
        assert got[0, 0].isnan()
        assert got[0, 17] == math.inf


def test_segment_pool_reads_strided_inputs() -> None:
    x, cu = torch.randn(40, 30).T, bounds_of([12, 18])
    assert torch.equal(
        ops.segment_pool(x, cu, "mean"), ops.segment_pool(x.contiguous(), cu, "mean")
    )


def test_segment_pool_refuses() -> None:
    x, cu = torch.randn(10, 4), bounds_of([10])
    with pytest.raises(RuntimeError, match='how must be mean or max, is "sum"'):
        ops.segment_pool(x, cu, "sum")
    with pytest.raises(RuntimeError, match=r"input must have 2 dimension\(s\), has shape \[40\]"):
        ops.segment_pool(x.reshape(40), cu, "mean")
    with pytest.raises(RuntimeError, match=r"input must have dtype float32.*has int64"):
        ops.segment_pool(x.long(), cu, "mean")
    with pytest.raises(RuntimeError, match="cu_seqlens must have dtype int32, has int64"):
        ops.segment_pool(x, cu.long(), "mean")
    for bounds, message in (
        ([0, 5, 4, 10], "cu_seqlens must not decrease, goes from 5 to 4 at sequence 1"),
        ([1, 10], "cu_seqlens must begin with 0, begins with 1"),
        ([0, 9], "cu_seqlens must end with the number of tokens, 10, ends with 9"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.segment_pool(x, torch.tensor(bounds, dtype=torch.int32), "mean")
    with pytest.raises(ValueError, match="how must be mean or max"):
        twins.segment_pool(x, cu, "sum")


# ---- encoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 32), (1, 64), (11, 6), (1, 128)])
def test_encoder(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    for lengths in ([1], LENGTHS, [3, 0, 2]):
        inputs = encoder_inputs(dtype, lengths, heads, head_dim)
        close(encode(prepared(inputs)), twins.encode(**inputs), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 32), (1, 64)])
@pytest.mark.parametrize(("embedding", "stored"), [(None, 1), (24, 2), (24, 1), (150, 1)])
def test_shared_layers_and_projected_embeddings(
    dtype: torch.dtype, heads: int, head_dim: int, embedding: int | None, stored: int
) -> None:
    for lengths in ([1], LENGTHS, [3, 0, 2], []):
        inputs = encoder_inputs(dtype, lengths, heads, head_dim, embedding=embedding, stored=stored)
        close(encode(prepared(inputs)), twins.encode(**inputs), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("activation", "distance", "heads", "head_dim"),
    [("gelu_tanh", 0, 2, 32), ("relu", 0, 1, 64), ("silu", 3, 11, 6), ("gelu", 127, 1, 64)],
)
def test_other_activations_and_relative_biases(
    dtype: torch.dtype, activation: str, distance: int, heads: int, head_dim: int
) -> None:
    for embedding, lengths in ((None, [1]), (24, LENGTHS), (None, [3, 0, 2]), (None, [])):
        inputs = encoder_inputs(
            *(dtype, lengths, heads, head_dim),
            embedding=embedding,
            activation=activation,
            distance=distance,
        )
        close(encode(prepared(inputs)), twins.encode(**inputs), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_op_of_interface_1_is_the_same_encoder(dtype: torch.dtype) -> None:
    inputs = prepared(encoder_inputs(dtype, [1, 7, 113]))
    *first, weights, _, _ = inputs.values()
    assert torch.equal(ops.encoder(*first, *weights, 2, 1e-12), encode(inputs))
    with pytest.raises(RuntimeError, match=r"qkv_bias must have 2 dimensions, has shape \[30\]"):
        ops.encoder(*first, *weights[:6], torch.zeros(30), *weights[7:], 2, 1e-12)


def test_weights_that_are_prepared() -> None:
    weight = torch.randn(2, 40, 24)
    blob = ops.prepare_weight(weight)
    assert ops.is_prepared(blob, weight)
    assert ops.is_prepared(ops.prepare_weight(weight[0]), weight[0])
    for other in (weight.half(), weight[:1], weight[:, :39], weight[:, :, :23], weight[0, 0]):
        assert not ops.is_prepared(blob, other)
    for other in (weight, torch.zeros_like(blob), blob[:64], blob[:-64], torch.empty(0)):
        assert not ops.is_prepared(other, weight)
    assert not ops.is_prepared(blob, blob)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_float_weight_has_no_scale(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8).to(dtype)
    with pytest.raises(RuntimeError, match=r"scale must be None for a .* weight; only quantised"):
        ops.prepare_weight(weight, torch.ones(4))


def plain_torch_encoder(p: dict[str, Any], activation: str) -> Tensor:
    """The same layers in the inputs' own type, as a library that keeps to it computes them."""
    w, cu, heads, eps = named(p), p["cu_seqlens"].tolist(), 4, 1e-12
    hidden = w["embeddings.word"].shape[1]
    positions = twins.positions_of(p["cu_seqlens"], cu[-1])
    x = w["embeddings.word"][p["input_ids"]] + w["embeddings.position"][positions]
    x = x + w["embeddings.token_type"][p["token_type_ids"]]
    x = F.layer_norm(x, (hidden,), w["embeddings.norm.weight"], w["embeddings.norm.bias"], eps)
    activated = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }[activation]
    bias = w.get("attention.relative_bias")

    def linear(x: Tensor, name: str, i: int) -> Tensor:
        return F.linear(x, w[f"layers.{name}.weight"][i], w[f"layers.{name}.bias"][i])

    def norm(x: Tensor, name: str, i: int) -> Tensor:
        gamma, beta = w[f"layers.{name}.weight"][i], w[f"layers.{name}.bias"][i]
        return F.layer_norm(x, (hidden,), gamma, beta, eps)

    for i in range(2):
        qkv = linear(x, "qkv", i)
        context = torch.empty_like(x)
        for a, b in itertools.pairwise(cu):
            q, k, v = (
                t.reshape(b - a, heads, -1).transpose(0, 1)[None] for t in qkv[a:b].split(hidden, 1)
            )
            added = None if bias is None else twins.bias_of_distances(bias, b - a).to(x.dtype)
            attended = F.scaled_dot_product_attention(q, k, v, added)[0]
            context[a:b] = attended.transpose(0, 1).reshape(b - a, hidden)
        x = norm(x + linear(context, "out", i), "norm1", i)
        x = norm(x + linear(activated(linear(x, "up", i)), "down", i), "norm2", i)
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "distance"), [("gelu", 0), ("gelu_tanh", 0), ("relu", 16), ("silu", 127)]
)
def test_half_precision_errs_at_most_twice_as_much_as_torch(
    dtype: torch.dtype, activation: str, distance: int
) -> None:
    inputs = encoder_inputs(
        *(dtype, [1, 7, 113, 64], 4, 32, 256), activation=activation, distance=distance
    )
    want = twins.encode(**inputs)
    ours = (encode(prepared(inputs)).float() - want).abs().max()
    theirs = (plain_torch_encoder(inputs, activation).float() - want).abs().max()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_in_nothing_out(dtype: torch.dtype) -> None:
    inputs = prepared(encoder_inputs(dtype, []))
    assert encode(inputs).shape == (0, 64)
    inputs["cu_seqlens"] = torch.zeros(3, dtype=torch.int32)  # two empty sequences
    assert encode(inputs).shape == (0, 64)
    none = torch.zeros(0, 64, dtype=dtype)
    gamma = torch.ones(64, dtype=dtype)
    cu = torch.zeros(1, dtype=torch.int32)
    weight = ops.prepare_weight(torch.ones(48, 64, dtype=dtype))
    assert ops.linear(none, weight, None, None).shape == (0, 48)
    assert ops.varlen_attention(none.repeat(1, 3), cu, 0, 2).shape == (0, 64)
    assert ops.residual_layer_norm(none, None, none, gamma, gamma, 1e-5).shape == (0, 64)
    assert ops.bias_activation(none, None, "gelu").shape == (0, 64)
    assert ops.segment_pool(none, cu, "mean").shape == (0, 64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("distance", [0, 20])
def test_a_sequence_does_not_see_its_batch(dtype: torch.dtype, distance: int) -> None:
    inputs = prepared(encoder_inputs(dtype, [9, 100, 131], distance=distance))
    among = encode(inputs)[9:109]
    inputs["input_ids"] = inputs["input_ids"][9:109]
    inputs["token_type_ids"] = inputs["token_type_ids"][9:109]
    inputs["cu_seqlens"] = bounds_of([100])
    assert torch.equal(encode(inputs), among)


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    inputs = prepared(encoder_inputs(dtype, [511, 113, 7], heads=3, inner=300, distance=60))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(encode(inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_one_thread_means_one_thread() -> None:
    """With torch.set_num_threads(1) the op starts no thread, seen in a process of its own."""
    code = (
        "import os, torch, ft_handler; torch.set_num_threads(1); ft_handler.load_library();"
        "o = torch.ops.fastertransformer; w = o.prepare_weight(torch.randn(512, 512));"
        "count = lambda: len(os.listdir('/proc/self/task')); before = count();"
        "o.linear(torch.randn(600, 512), w, None, None, 'gelu'); assert count() == before"
    )
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counting threads needs /proc")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_concurrent_calls_do_not_mix() -> None:
    cases = []
    for lengths in ([5, 80], [113], [1, 1, 40], [200]):
        inputs = prepared(encoder_inputs(torch.float32, lengths))
        cases.append((inputs, encode(inputs)))
    wrong: list[int] = []

    def work(case: int) -> None:
        inputs, want = cases[case]
        for _ in range(4):
            if not torch.equal(encode(inputs), want):
                wrong.append(case)

    pool = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert not wrong


# ---- padding ------------------------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Masks [B,S] with holes anywhere but in column 0."""
    batch, seqlen = draw(st.integers(0, 5)), draw(st.integers(1, 9))
    rows = [
        [1, *draw(st.lists(st.integers(0, 1), min_size=seqlen - 1, max_size=seqlen - 1))]
        for _ in range(batch)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(batch, seqlen)


@settings(max_examples=60)
@given(
    masks(),
    st.sampled_from([torch.int64, torch.int32, torch.bool]),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_padding_round_trip(mask: Tensor, mask_type: torch.dtype, id_type: torch.dtype) -> None:
    ids = torch.arange(mask.numel(), dtype=id_type).reshape(mask.shape)
    got = ops.remove_padding(ids, ids + 1, mask.to(mask_type))
    want = twins.remove_padding(ids, ids + 1, mask)
    for a, b in zip(got[:5], want[:5], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert got[5] == want[5]
    packed = torch.randn(got[0].shape[0], 3)
    restored = ops.restore_padding(packed, got[3], *mask.shape, -7.0)
    assert torch.equal(restored, twins.restore_padding(packed, got[3], *mask.shape, -7.0))
    assert (restored[mask == 0] == -7.0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_restore_padding_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    packed = torch.randn(3, *shape).to(dtype)
    indices = torch.tensor([0, 4, 5])
    got = ops.restore_padding(packed, indices, 2, 3, -10000.0)
    assert got.shape == (2, 3, *shape)
    assert torch.equal(got, twins.restore_padding(packed, indices, 2, 3, -10000.0))


def test_padding_refuses() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="keeps none of row 1"):
        ops.remove_padding(ids, ids, torch.tensor([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(RuntimeError, match="row 0 drops it"):
        ops.remove_padding(ids, ids, torch.tensor([[0, 1, 1], [1, 0, 0]]))
    with pytest.raises(RuntimeError, match=r"attention_mask must have the shape of input_ids"):
        ops.remove_padding(ids, ids, torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="attention_mask must have dtype int64, int32 or bool"):
        ops.remove_padding(ids, ids, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="input_ids must have dtype int64 or int32"):
        ops.remove_padding(ids.float(), ids, ids + 1)
    with pytest.raises(RuntimeError, match=r"token_indices must be in \[0, 6\), has 6"):
        ops.restore_padding(torch.randn(1, 2), torch.tensor([6]), 2, 3, 0.0)


def test_strided_padding_inputs() -> None:
    ids, mask = torch.arange(12).reshape(4, 3).T, torch.tensor([[1, 1, 0, 1]] * 3)
    got = ops.remove_padding(ids, ids, mask.T.contiguous().T)
    want = twins.remove_padding(ids, ids, mask)
    assert all(torch.equal(a, b) for a, b in zip(got[:5], want[:5], strict=True))


# ---- instruction sets ---------------------------------------------------------------------------


def test_build_info_names_the_instruction_set() -> None:
    info = json.loads(ops.build_info())
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["cpu_isas"][-1] == "portable"
    forced = os.environ.get("FT_HANDLER_CPU_ISA")
    assert info["cpu_isa"] == (forced or info["cpu_isas"][0])
    assert {"version", "torch_build", "cuda_archs", "cuda_version", "tf32"} <= set(info)


def test_every_instruction_set() -> None:
    if os.environ.get("FT_HANDLER_CPU_ISA"):
        pytest.skip("one instruction set is forced")
    for isa in json.loads(ops.build_info())["cpu_isas"][1:]:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
                *(__file__, "-k", "not one_thread and not unknown"),
            ],
            env={**os.environ, "FT_HANDLER_CPU_ISA": isa},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{isa}:\n{done.stdout[-4000:]}"


def test_an_unknown_instruction_set_is_refused() -> None:
    code = "import torch, ft_handler; ft_handler.load_library(); "
    code += "torch.ops.fastertransformer.build_info()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FT_HANDLER_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "FT_HANDLER_CPU_ISA must be one of" in done.stderr
    assert "is mmx" in done.stderr


def test_memory_that_runs_out_is_named() -> None:
    # The words for which the pipeline splits a batch; torch's own do not come through. More than an
    # address space, or a machine that overcommits would try.
    row = torch.zeros(1, 1024)
    at = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"can't allocate memory for \[1048576, 262144, 1024\]"):
        torch.ops.fastertransformer.restore_padding(row, at, 1 << 20, 1 << 18, 0.0)
