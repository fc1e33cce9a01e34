"""A checkpoint's weights scripted as the fused model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ft_handler.architectures.base import Weights, listed
from ft_handler.errors import ModelError
from ft_handler.model.encoder import Encoder
from ft_handler.model.module import FusedModel, script
from ft_handler.model.spec import EncoderSpec
from ft_handler.precisions import Precision
from ft_handler.prepare import quantize
from ft_handler.prepare.quantize import Stacks
from ft_handler.tasks.base import AnyTask, Head


def fuse(
    task: AnyTask,
    head: Head,
    spec: EncoderSpec,
    weights: Weights,
    precision: Precision,
    columns: int,
    kept: Collection[str] = (),
    stacks: Stacks | None = None,
) -> torch.jit.ScriptModule:
    """Script the fused model; its encoder is stored in `precision`, its head in fp32.

    kept    of a precision with quantised products: those that are floats all the same
    stacks  these products, rounded; None: to the nearest

    Raises ModelError for weights that are not finite there.
    """
    stored = {n: precision.stored(w) for n, w in weights.encoder.items()}
    arguments = head_arguments(weights)
    for type_, tensors in ((precision.name, stored), ("fp32", arguments)):
        if over := sorted(n for n, w in tensors.items() if not bool(torch.isfinite(w).all())):
            raise ModelError(f"weights that are not finite in {type_}: {listed(over)}")
    layers = None
    if precision.quantized is not None:
        # A GPU computes these in the stored type, so they had to be finite there as well.
        stored, layers = quantize.stored(spec, weights.encoder, precision, kept, stacks)
    encoder = Encoder(spec, stored, layers)
    return script(FusedModel(encoder, head.module(**arguments), task.name, task.per_token, columns))


def head_arguments(weights: Weights) -> dict[str, Tensor]:
    """What a head is made of: its weights in fp32 by its arguments' names."""
    return {n: w.detach().float().contiguous() for n, w in weights.head.items()}
