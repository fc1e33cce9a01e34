"""Random encoder stacks for the GPU tests."""

from __future__ import annotations

import torch

LAYERS = 3
VOCABULARY = 50


def random_stack(
    size: tuple[int, int, int], dtype: torch.dtype, positions: int = 96
) -> list[torch.Tensor]:
    """Every tensor of a stack, in the encoder op's order; `size` is hidden, heads, intermediate."""
    hidden, _, wide = size
    g = torch.Generator(device="cuda").manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda", generator=g) * scale).to(dtype)

    def norm(*shape: int) -> list[torch.Tensor]:
        return [1 + normal(*shape, scale=0.1), normal(*shape, scale=0.1)]

    def linear(n: int, k: int) -> list[torch.Tensor]:
        return [normal(LAYERS, n, k, scale=k**-0.5), normal(LAYERS, n, scale=0.1)]

    tables = [normal(rows, hidden) for rows in (VOCABULARY, positions, 2)]
    return [
        *(*tables, *norm(hidden)),
        *(*linear(3 * hidden, hidden), *linear(hidden, hidden), *norm(LAYERS, hidden)),
        *(*linear(wide, hidden), *linear(hidden, wide), *norm(LAYERS, hidden)),
    ]
