"""Arguments of one call of each op, for torch's checker on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from encoder_support import GEMM_WEIGHTS, random_weights
from torch import Tensor

from ft_handler.model.spec import EncoderSpec

TOKENS, HIDDEN, HEADS, INNER, LAYERS, DISTANCE = 7, 24, 2, 40, 2, 2
SPEC = EncoderSpec(
    hidden_size=HIDDEN,
    embedding_size=16,
    num_layers=LAYERS,
    num_heads=HEADS,
    intermediate_size=INNER,
    activation="gelu_tanh",
    layer_norm_eps=1e-12,
    relative_distance=DISTANCE,
)
CU_SEQLENS = torch.tensor([0, 3, 7], dtype=torch.int32)


def normal(*shape: int) -> Tensor:
    """Small random numbers."""
    return torch.randn(*shape) * 0.3


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, types and a ragged mask: three `[2,5]`."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]])
    return torch.randint(0, 30, (2, 5)), torch.randint(0, 2, (2, 5)), mask


def ids() -> tuple[Tensor, Tensor]:
    """Packed ids and types."""
    return torch.randint(0, 30, (TOKENS,)), torch.randint(0, 2, (TOKENS,))


def tables() -> list[Tensor]:
    """Embedding tables and their norm."""
    return [
        normal(30, HIDDEN),
        normal(8, HIDDEN),
        normal(2, HIDDEN),
        normal(HIDDEN),
        normal(HIDDEN),
    ]


def encoder_weights(
    prepare: Callable[[Tensor], Tensor], spec: EncoderSpec, stored: int
) -> dict[str, Tensor]:
    """An encoder's weights, those of its GEMMs prepared."""
    return {
        name: prepare(tensor) if name in GEMM_WEIGHTS else tensor
        for name, tensor in random_weights(spec, stored=stored).items()
    }


def encode_arguments(prepare: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """One call of `encode`: shared layers, projected embeddings, a relative bias."""
    weights = encoder_weights(prepare, SPEC, 1)
    return (*ids(), None, CU_SEQLENS, 4, list(weights.values()), SPEC.text(weights), "")


def encoder_arguments(prepare: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """One call of interface 1's op."""
    spec = dataclasses.replace(SPEC, embedding_size=HIDDEN, activation="gelu", relative_distance=0)
    weights = encoder_weights(prepare, spec, LAYERS)
    return (*ids(), None, CU_SEQLENS, 4, *weights.values(), HEADS, 1e-12)


def moved(value: Any, device: str) -> Any:
    """The value with every tensor of it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device) for one in value)
    return value


def arguments(
    name: str, prepare: Callable[[Tensor], Tensor], device: str = "cpu"
) -> tuple[Any, ...]:
    """Arguments of one call of each op; weights are prepared on `device`."""

    def there(tensor: Tensor) -> Tensor:
        return prepare(tensor.to(device))

    made: tuple[Any, ...] = moved(_arguments(name, there), device)
    return made


def _arguments(name: str, prepare: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    cases: dict[str, Callable[[], tuple[Any, ...]]] = {
        "prepare_weight": lambda: (normal(LAYERS, INNER, HIDDEN),),
        "remove_padding": padded,
        "restore_padding": lambda: (normal(3, 4), torch.tensor([0, 2, 7]), 2, 5, -1.0),
        "embedding_layer_norm": lambda: (*ids(), None, CU_SEQLENS, *tables(), 1e-12),
        "linear": lambda: (
            normal(TOKENS, HIDDEN),
            prepare(normal(INNER, HIDDEN)),
            normal(INNER),
            normal(TOKENS, INNER),
            "",
        ),
        "varlen_attention": lambda: (
            *(normal(TOKENS, 3 * HIDDEN), CU_SEQLENS, 4, HEADS),
            normal(HEADS, 2 * DISTANCE + 1),
        ),
        "residual_layer_norm": lambda: (
            normal(TOKENS, HIDDEN),
            normal(HIDDEN),
            normal(TOKENS, HIDDEN),
            normal(HIDDEN),
            normal(HIDDEN),
            1e-12,
        ),
        "bias_activation": lambda: (normal(TOKENS, INNER), normal(INNER), "silu"),
        "segment_pool": lambda: (normal(TOKENS, HIDDEN), CU_SEQLENS, "mean"),
        "encode": lambda: encode_arguments(prepare),
        "encoder": lambda: encoder_arguments(prepare),
        "is_prepared": lambda: (prepare(torch.ones(INNER, HIDDEN)), torch.ones(INNER, HIDDEN)),
    }
    torch.manual_seed(1)
    return cases[name]()


NAMES = (
    "prepare_weight",
    "remove_padding",
    "restore_padding",
    "embedding_layer_norm",
    "linear",
    "varlen_attention",
    "residual_layer_norm",
    "bias_activation",
    "segment_pool",
    "encode",
    "is_prepared",
)
# It serves files of format 1 and is the same encoder: no wrapper and no twin.
OLD_NAMES = ("encoder",)
UNTRACEABLE = ("remove_padding", "is_prepared")
