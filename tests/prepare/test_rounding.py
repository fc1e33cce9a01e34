"""Weights rounded for the inputs that they meet."""

from __future__ import annotations

import pytest
import torch

from ft_handler.prepare.rounding import rounded, rounded_for

TYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES)
def test_inputs_that_go_together_make_up_for_one_another(dtype: torch.dtype) -> None:
    # 300 columns are more than one block, and made of 40 numbers that they share.
    inputs = torch.randn(500, 40) @ torch.randn(40, 300) + 0.1 * torch.randn(500, 300)
    weight = torch.randn(20, 300)
    weight[3] = 0
    nearest, scale = rounded(weight, dtype)
    found, same = rounded_for(weight, dtype, inputs.T @ inputs / len(inputs))
    assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, weight.shape, True)
    assert torch.equal(scale, same)

    def error(steps: torch.Tensor) -> float:
        return float((inputs @ (steps.float() * scale[:, None] - weight).T).norm())

    assert error(found) < 0.5 * error(nearest)


@pytest.mark.parametrize("dtype", TYPES)
def test_inputs_that_do_not_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 48)
    for moments in (torch.diag(torch.rand(48) + 0.1), torch.zeros(48, 48)):
        for found, wanted in zip(
            rounded_for(weight, dtype, moments), rounded(weight, dtype), strict=True
        ):
            assert torch.equal(found.float(), wanted.float())


def test_no_number_ends_beyond_the_largest() -> None:
    moments = torch.full((64, 64), 1e30) + torch.diag(torch.full((64,), 1e30))
    weight = torch.ones(4, 64)
    for dtype, most in zip(TYPES, (127, 448), strict=True):
        found, scale = rounded_for(weight, dtype, moments)
        assert float(found.float().abs().max()) <= most
        assert torch.isfinite(found.float()).all()
        torch.testing.assert_close(scale, torch.full((4,), 1 / most))
