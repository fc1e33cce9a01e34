"""How weights are rounded to 8 bits: each to the nearest number, or for the inputs they meet."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_handler.native import twins

#: What is added to the moments' diagonal, as a part of its mean, and columns rounded as one block.
DAMPING, BLOCK = 0.01, 128


def rounded(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float weight `[...,N,K]` as int8 of -127 to 127 or as e4m3, and its scale, fp32 `[...,N]`.

    The scale is what 1 is worth: the largest weight of an output is the type's largest number.
    """
    weight = weight.detach().float()
    scale = _scale(weight, dtype)
    return _nearest(weight / scale.unsqueeze(-1), dtype).contiguous(), scale


def rounded_for(weight: Tensor, dtype: torch.dtype, moments: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a weight `[N,K]` whose inputs x have the moments `mean(x x^T)`, `[K,K]`.

    Columns are rounded one after another, those of the largest inputs first, and what each is off
    by is made up for by those that are still to be rounded, as far as inputs go together (GPTQ,
    Frantar et al., arXiv 2210.17323).
    """
    weight = weight.detach().float()
    scale = _scale(weight, dtype)
    sizes = moments.diagonal()
    order = sizes.argsort(descending=True)
    damped = moments[order][:, order] + DAMPING * sizes.mean() * torch.eye(len(sizes))
    # Turned around, the lower factor of the moments is the upper one of their inverse, inverted.
    factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return rounded(weight, dtype)  # inputs that are all zero, or too large to be squared
    passed_on = torch.linalg.solve_triangular(factor.flip(0, 1), torch.eye(len(sizes)), upper=True)
    columns = (weight / scale.unsqueeze(-1)).T[order].contiguous()
    for begin in range(0, len(columns), BLOCK):
        block = columns[begin : begin + BLOCK]
        shares = passed_on[begin : begin + BLOCK, begin:]
        errors = torch.empty_like(block)
        for i, column in enumerate(block):
            nearest = _nearest(column, dtype).float()
            torch.div(column - nearest, shares[i, i], out=errors[i])
            column.copy_(nearest)
            block[i + 1 :].addr_(shares[i, i + 1 : len(block)], errors[i], alpha=-1)
        columns[begin + BLOCK :].addmm_(shares[:, len(block) :].T, errors, alpha=-1)
    return columns[order.argsort()].T.to(dtype).contiguous(), scale


def _scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    largest = weight.abs().amax(-1)
    # A row of zeros takes any scale.
    return torch.where(largest > 0, largest / _largest(dtype), 1.0)


def _largest(dtype: torch.dtype) -> float:
    return twins.LARGEST_NARROW if dtype.is_floating_point else twins.LEVELS


def _nearest(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of the type, which ends at `_largest`."""
    if not dtype.is_floating_point:
        steps = torch.round(steps)
    most = _largest(dtype)
    return steps.clamp(-most, most).to(dtype)
