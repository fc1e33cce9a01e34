"""Random encoder stacks for the GPU tests."""

from __future__ import annotations

import torch

from ft_handler.model.encoder import PRODUCTS, weight_names
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


def narrow_stack(
    size: tuple[int, int, int], floats: str = "", positions: int = 96
) -> tuple[list[torch.Tensor], str]:
    """A stack in fp16 whose products have e4m3 weights too, and its specification.

    floats  the layers in which a product does without them, such as "qkv:1;up:0,2"
    """
    stack, spec = random_stack(size, torch.float16, positions), specification(size)
    names = dict(word.split("=", 1) for word in spec.split())["weights"].split(",")
    more: dict[str, torch.Tensor] = {}
    for product in (name for name in PRODUCTS if f"{name}.weight" in names):
        at = names.index(f"{product}.weight")
        scale = stack[at].float().abs().amax(-1) / 448
        narrow = (stack[at].float() / scale[..., None]).to(torch.float8_e4m3fn)
        stack[at] = (narrow.float() * scale[..., None]).half()
        # Inputs of up to 22, which is more than any of these products gets.
        inputs = torch.full((LAYERS,), 0.05, device="cuda")
        more |= {
            f"{product}.narrow": torch.ops.fastertransformer.prepare_narrow(narrow),
            f"{product}.narrow_scale": scale * inputs[:, None],
            f"{product}.input_scale": inputs,
        }
    spec = spec.replace(",".join(names), ",".join([*names, *more]))
    return [*stack, *more.values()], f"{spec} floats={floats}" if floats else spec
