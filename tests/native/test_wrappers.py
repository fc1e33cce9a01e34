"""Schemas, fake kernels and wrappers of the ops, by torch's own checker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoder_support import GEMM_WEIGHTS, random_weights
from torch import Tensor

from ft_handler.model.spec import EncoderSpec
from ft_handler.native import ops, twins

TOKENS, HIDDEN, HEADS, INNER, LAYERS = 7, 24, 2, 40, 2
SPEC = EncoderSpec(
    hidden_size=HIDDEN,
    embedding_size=16,
    num_layers=LAYERS,
    num_heads=HEADS,
    intermediate_size=INNER,
    activation="gelu",
    layer_norm_eps=1e-12,
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
    """One call of `encode`, with shared layers and projected embeddings."""
    weights = encoder_weights(prepare, SPEC, 1)
    return (*ids(), None, CU_SEQLENS, 4, list(weights.values()), SPEC.text(weights), "")


def encoder_arguments(prepare: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """One call of interface 1's op."""
    spec = dataclasses.replace(SPEC, embedding_size=HIDDEN)
    weights = encoder_weights(prepare, spec, LAYERS)
    return (*ids(), None, CU_SEQLENS, 4, *weights.values(), HEADS, 1e-12)


def arguments(name: str, prepare: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """Arguments of one call of each op."""
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
        "varlen_attention": lambda: (normal(TOKENS, 3 * HIDDEN), CU_SEQLENS, 4, HEADS),
        "residual_layer_norm": lambda: (
            normal(TOKENS, HIDDEN),
            normal(HIDDEN),
            normal(TOKENS, HIDDEN),
            normal(HIDDEN),
            normal(HIDDEN),
            1e-12,
        ),
        "bias_activation": lambda: (normal(TOKENS, INNER), normal(INNER), "gelu"),
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
    "encode",
    "is_prepared",
)
# It serves files of format 1 and is the same encoder: no wrapper and no twin.
OLD_NAMES = ("encoder",)
UNTRACEABLE = ("remove_padding", "is_prepared")


@pytest.mark.parametrize("name", NAMES + OLD_NAMES)
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.fastertransformer, name).default
    checks = ["test_schema", "test_autograd_registration"]
    if name not in UNTRACEABLE:  # they return a plain number, which cannot be traced
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, arguments(name, ops.prepare_weight), test_utils=checks)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "prepare_weight"])
def test_wrappers_agree_with_their_twins(name: str) -> None:
    found = getattr(ops, name)(*arguments(name, ops.prepare_weight))
    wanted = getattr(twins, name)(*arguments(name, twins.prepare_weight))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_library_registers_nothing_without_a_twin() -> None:
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name for s in schemas if s.name.startswith("fastertransformer::")}
    assert registered - {"fastertransformer::build_info"} >= {
        f"fastertransformer::{n}" for n in NAMES + OLD_NAMES
    }
    for name in NAMES:
        assert callable(getattr(twins, name))
        assert callable(getattr(ops, name))


def test_linear_without_bias_and_residual_compiles() -> None:
    weight = ops.prepare_weight(normal(INNER, HIDDEN))
    op = torch.ops.fastertransformer.linear.default
    utilities = ("test_schema", "test_faketensor")
    for bias, residual in ((None, None), (None, normal(TOKENS, INNER))):
        arguments = (normal(TOKENS, HIDDEN), weight, bias, residual, "gelu")
        torch.library.opcheck(op, arguments, test_utils=utilities)
