"""Random encoder stacks for the GPU tests."""

from __future__ import annotations

import torch

from ft_handler.model.encoder import weight_names
from ft_handler.model.spec import EncoderSpec

LAYERS = 3
VOCABULARY = 50


def specification(size: tuple[int, int, int], activation: str = "gelu", distance: int = 0) -> str:
    """What the op `encode` reads of a random stack; `size` is hidden, heads, intermediate."""
    hidden, heads, wide = size
    spec = EncoderSpec(
        hidden_size=hidden,
        embedding_size=hidden,
        num_layers=LAYERS,
        num_heads=heads,
        intermediate_size=wide,
        activation=activation,
        layer_norm_eps=1e-12,
        relative_distance=distance,
    )
    return spec.text(weight_names(spec))


def random_stack(
    size: tuple[int, int, int], dtype: torch.dtype, positions: int = 96, distance: int = 0
) -> list[torch.Tensor]:
    """Every tensor of a stack, in the op's order; `size` is hidden, heads, intermediate.

    A relative bias of distances up to `distance` comes last, where that is not 0.
    """
    hidden, heads, wide = size
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
        *([normal(heads, 2 * distance + 1, scale=2.0)] if distance else []),
    ]
