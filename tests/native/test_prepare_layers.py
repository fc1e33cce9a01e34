"""The wrapper of `prepare_layers` and its fake kernel; test_int8_ops.py holds the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_handler.native import ops, twins
from ft_handler.native.library import build_info


def layers() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Three layers `[32,96]`, the middle one kept."""
    quantized = torch.randint(-127, 128, (2, 32, 96), dtype=torch.int8)
    return quantized, torch.rand(2, 32) / 50, torch.randn(1, 32, 96), [1]


def test_the_result_is_known_by_what_it_was_made_of() -> None:
    quantized, scale, kept, which = layers()
    blob = ops.prepare_layers(quantized, scale, kept, which)
    assert ops.is_prepared(blob, quantized)
    assert not ops.is_prepared(blob, torch.zeros(3, 32, 95, dtype=torch.int8))
    assert not ops.is_prepared(torch.zeros_like(blob), quantized)
    whole = ops.prepare_layers(quantized[:0], scale[:0], kept, [0])
    assert ops.is_prepared(whole, kept)


def test_one_layer_multiplies() -> None:
    quantized, scale, kept, _ = layers()
    x = torch.randn(5, 96)
    none = kept[:0], []
    blob = ops.prepare_layers(quantized[:1], scale[:1], *none)
    levels = twins.input_levels(build_info()["cpu_isa"])
    twin = twins.prepare_layers(quantized[:1], scale[:1], *none, levels)
    found, wanted = ops.linear(x, blob, None, None), twins.linear(x, twin, None, None)
    exact = x @ (quantized[0] * scale[0][:, None]).T
    assert (found - wanted).norm() < 0.1 * (wanted - exact).norm()


def test_opcheck() -> None:
    quantized, scale, kept, which = layers()
    op = torch.ops.fastertransformer.prepare_layers.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for call in (
        (quantized, scale, kept, which),
        (quantized[:0], scale[:0], kept, [0]),
        (quantized, scale, kept[:0], []),
    ):
        torch.library.opcheck(op, call, test_utils=checks)


def test_slices() -> None:
    assert [twins.slice_length(k) for k in (24, 64, 384, 512, 768, 1096, 3072)] == [
        64, 64, 384, 512, 384, 384, 512,
    ]  # fmt: skip


def test_an_outlier_coarsens_its_slice_alone() -> None:
    x = torch.rand(3, 1024) + 0.5
    exact = x.clone()
    x[:, 700] = exact[:, 700] = 1e4
    quantized = torch.randint(-127, 128, (8, 1024), dtype=torch.int8)
    quantized[:, 700] = 0
    scale = torch.ones(8)
    first = quantized.clone()
    first[:, 512:] = 0
    wanted = exact @ first.float().T
    near = twins.quantized_product(x, first, scale)
    assert (near - wanted).norm() < 0.02 * wanted.norm()
    second = quantized.clone()
    second[:, :512] = 0
    # All but the outlier are rounded to nothing.
    assert torch.equal(twins.quantized_product(x, second, scale), torch.zeros(3, 8))


def test_numbers_that_are_none_make_their_rows_nan() -> None:
    x = torch.randn(4, 64)
    x[1, 3], x[2, 0], x[3] = float("nan"), float("inf"), 0.0
    quantized, scale = torch.ones(2, 64, dtype=torch.int8), torch.ones(2)
    found = twins.quantized_product(x, quantized, scale)
    assert torch.isnan(found).all(1).tolist() == [False, True, True, False]
    assert torch.equal(found[3], torch.zeros(2))
