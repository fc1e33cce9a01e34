"""Encoders with products in 8 bits, and their float simulations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ft_handler import architectures, precisions
from ft_handler.model.encoder import Encoder, NarrowProduct, RoundedProduct
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.native.library import build_info
from ft_handler.prepare import quantize
from ft_handler.prepare.fuse import head_arguments
from ft_handler.prepare.quantize import Simulation
from ft_handler.tasks.base import AnyTask


def levels_here() -> int:
    """The largest magnitude of a quantised input on this processor."""
    return twins.input_levels(build_info()["cpu_isa"])


def rounding() -> float:
    """What a file may differ from its simulation by, as a part of what quantising costs.

    Sums that differ in their last bits are rounded to other steps here and there, and the next
    layers round those otherwise again. Weights that were not quantised at all would show 1. Where
    inputs are bfloat16 before they are rounded, that shows as well.
    """
    return 1.0 if build_info()["cpu_isa"] in ("amx", "avx512_bf16") else 0.75


def quantized_encoder(
    spec: EncoderSpec,
    weights: Mapping[str, Tensor],
    kept: Collection[str],
    data_type: str = "int8",
) -> Encoder:
    """The encoder of fp32 weights as a file has it, not scripted."""
    tensors, layers = quantize.stored(spec, weights, precisions.get(data_type), kept)
    return Encoder(spec, tensors, layers).eval()


def simulated_weights(encoder: Encoder) -> list[twins.Weight]:
    """What the eager twin of `encode` gets for such an encoder, in its order."""
    tensors = dict(encoder.named_buffers())
    modules = dict(encoder.named_modules())

    def weight(name: str) -> twins.Weight:
        p: Any = modules.get(name.removesuffix(".weight"))
        if not isinstance(p, RoundedProduct):
            return tensors[name].float()
        if isinstance(p, NarrowProduct):
            return twins.narrow_layers(p.weight, p.scale, p.input_scale, p.kept, p.kept_layers)
        return twins.prepare_layers(p.weight, p.scale, p.kept, p.kept_layers, levels_here())

    names = dict(word.split("=", 1) for word in encoder.spec.split())["weights"]
    return [weight(name) for name in names.split(",")]


def float_weights(encoder: Encoder) -> list[Tensor]:
    """The weights in the op's order, products as the floats that they round."""
    tensors, modules = dict(encoder.named_buffers()), dict(encoder.named_modules())

    def weight(name: str) -> Tensor:
        module = modules[name.rpartition(".")[0]]
        rounded = isinstance(module, RoundedProduct) and name.endswith(".weight")
        return module.dequantized() if rounded else tensors[name]

    names = dict(word.split("=", 1) for word in encoder.spec.split())["weights"]
    return [weight(name) for name in names.split(",")]


def simulation_of(model: Any, task: AnyTask, data_type: str = "int8") -> Simulation:
    """The float simulation of a transformers model's file."""
    architecture = architectures.get(model.config.model_type)
    weights = architecture.weights(task, model.config, model.state_dict())
    head = architecture.head(task).module(**head_arguments(weights))
    spec = architecture.spec(model.config)
    return Simulation(spec, weights, head, precisions.get(data_type), levels_here())


def apart(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference."""
    return float((found.float() - wanted).square().mean().sqrt())


def exact_weights(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """The same without rounding."""
    return [torch.as_tensor(weight).float() for weight in weights.values()]
