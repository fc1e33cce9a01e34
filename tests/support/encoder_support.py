"""Random weights of an encoder, under the names that a traced file gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_handler.model.spec import EncoderSpec

GEMM_WEIGHTS = (
    "layers.qkv.weight", "layers.out.weight", "layers.up.weight", "layers.down.weight",
    "embeddings.projection.weight",
)  # fmt: skip


def random_weights(
    spec: EncoderSpec, dtype: torch.dtype = torch.float32, *, stored: int | None = None
) -> dict[str, Tensor]:
    """Small random tensors of every name, in the op's order; `stored` layers of each stack."""
    hidden, width, inner = spec.hidden_size, spec.embedding_size, spec.intermediate_size
    layers = spec.num_layers if stored is None else stored

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape) * 0.1).to(dtype)

    def norm(name: str, *shape: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(*shape) + 1, f"{name}.bias": draw(*shape)}

    def linear(name: str, n: int, k: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(layers, n, k), f"{name}.bias": draw(layers, n)}

    weights = {
        "embeddings.word": draw(30, width),
        "embeddings.position": draw(512, width),
        "embeddings.token_type": draw(2, width),
        **norm("embeddings.norm", width),
        **linear("layers.qkv", 3 * hidden, hidden),
        **linear("layers.out", hidden, hidden),
        **norm("layers.norm1", layers, hidden),
        **linear("layers.up", inner, hidden),
        **linear("layers.down", hidden, inner),
        **norm("layers.norm2", layers, hidden),
    }
    if width != hidden:
        weights["embeddings.projection.weight"] = draw(hidden, width)
        weights["embeddings.projection.bias"] = draw(hidden)
    if spec.relative_distance:
        # Far larger than weights, so that a bias at the wrong place shows.
        weights["attention.relative_bias"] = (
            torch.randn(spec.num_heads, 2 * spec.relative_distance + 1) * 2
        ).to(dtype)
    return weights
