"""What calibration texts are good for: smaller inputs of products, and weights rounded for them.

Both cost nothing when the model is served.

**Inputs are centred.** What rounding costs grows with an input's size, and some columns are large
only because they are about the same for all texts. Their mean is taken out of the bias that makes
them and put into the biases behind, where it is not rounded: of a layer norm that is the bias of
the product that reads it, and the next norm's, whose residual it is; of attention it is the values'
bias, since a mean of values moves as they do (Outlier Suppression+, Wei et al., arXiv 2304.09145).
In exact numbers the model is the same, whatever the texts were.

**Weights are rounded for their inputs**, as `rounding.rounded_for` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ft_handler.model.encoder import PROJECTION, weight_names
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.precisions import Precision
from ft_handler.prepare.quantize import (
    Measured,
    Packed,
    Stacks,
    layered,
    rounded_products,
)
from ft_handler.prepare.rounding import rounded_for

#: Products whose inputs can be centred. Those of `down` are what an activation makes.
CENTRED = ("layers.qkv", "layers.out", "layers.up")


@dataclass(frozen=True)
class Calibrated:
    """An encoder's weights, the same model with centred inputs, and its products, rounded."""

    encoder: Mapping[str, Tensor]
    stacks: Stacks


def calibrated(
    spec: EncoderSpec, encoder: Mapping[str, Tensor], precision: Precision, texts: Packed
) -> Calibrated:
    """Centre and round an encoder's products for what they are given in fp32 on these texts."""
    assert precision.quantized is not None
    exact = {name: weight.detach().float() for name, weight in encoder.items()}
    watches = {
        product: [
            _Watch(
                weight,
                precision.quantized.dtype,
                product in CENTRED and (product != "layers.qkv" or _own_inputs(spec, exact)),
                spec.num_layers // len(stack) if product.startswith("layers.") else 1,
            )
            for weight in stack
        ]
        for product in rounded_products(exact, precision.quantized)
        for stack in [layered(exact[f"{product}.weight"])]
    }
    order = weight_names(spec, PROJECTION[0] in exact)
    weights: list[twins.Weight] = [
        twins.PreparedLayers(tuple(watches[product]))
        if (product := name.removesuffix(".weight")) in watches
        else exact[name]
        for name in order
    ]
    with torch.inference_mode():
        twins.encode(
            texts.input_ids,
            texts.token_type_ids,
            None,
            texts.cu_seqlens,
            texts.longest,
            weights,
            spec.text(order),
        )
    means = {p: [watch.mean for watch in watches[p]] for p in CENTRED}
    stacks = {
        product: (
            # torch does not stack 8-bit floats.
            torch.stack([w.rounded[0].view(torch.int8) for w in each]).view(each[0].dtype),
            torch.stack([w.rounded[1] for w in each]),
        )
        for product, each in watches.items()
    }
    return Calibrated(centred(spec, exact, means), stacks)


def rounded_better(
    measured: Measured, texts: Packed, say: Callable[[str], None] = lambda _: None
) -> Measured:
    """The measurement of products made for these texts, if they turn out better on its own.

    measured  that of weights each rounded to the nearest
    """
    plain = measured.simulation
    found = calibrated(plain.spec, plain.encoder, plain.precision, texts)
    other = measured.of(plain.over(found.encoder, found.stacks))
    before, after = measured.quantized(()), other.quantized(())
    say(
        f"weights rounded for texts: {plain.precision.name} changes outputs by {after:.1%}; "
        f"rounded to the nearest, by {before:.1%}"
    )
    return other if after < before else measured


class _Watch:
    """One layer's product in fp32, which is rounded as soon as all of its inputs were seen.

    calls  how many layers it serves
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, centre: bool, calls: int) -> None:
        self.weight, self.dtype = weight, dtype
        self._centre, self._calls = centre, calls
        self._seen = 0
        self._sum = weight.new_zeros(weight.shape[1])
        self._squares = weight.new_zeros(0)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._seen:
            self._squares = x.new_zeros(x.shape[1], x.shape[1])
        self._seen += len(x)
        self._sum += x.sum(0)
        self._squares.addmm_(x.T, x)
        self._calls -= 1
        if self._calls == 0:
            self.mean = self._sum / self._seen if self._centre else torch.zeros_like(self._sum)
            # Without the means, whatever rounding makes of them is not seen.
            moments = self._squares / self._seen - torch.outer(self.mean, self.mean)
            self.rounded = rounded_for(self.weight, self.dtype, moments)
            self._squares = self._squares.new_zeros(0)
        return x @ self.weight.T


def centred(
    spec: EncoderSpec, encoder: Mapping[str, Tensor], means: Mapping[str, list[Tensor]]
) -> dict[str, Tensor]:
    """The same model of which the inputs of products are less by these means, by layer `[K]`.

    Where one layer serves all, nothing is taken from the inputs of `qkv`: the head reads what the
    last one makes, and it would get less as well.
    """
    made = {n: w.clone() if n.endswith(".bias") else w for n, w in encoder.items()}

    def moved(product: str, layer: int, behind: str | None) -> Tensor:
        """Put a mean into the product's own bias, and into that before the norm `behind`."""
        mean = means[product][layer]
        made[f"{product}.bias"][layer] += encoder[f"{product}.weight"][layer] @ mean
        if behind is not None:
            made[f"{behind}.bias"][layer] += mean
        return mean

    for layer in range(len(means["layers.out"])):
        made["layers.qkv.bias"][layer, 2 * spec.hidden_size :] -= moved("layers.out", layer, None)
        made["layers.norm1.bias"][layer] -= moved("layers.up", layer, "layers.down")
        if _own_inputs(spec, encoder):
            mean = moved("layers.qkv", layer, "layers.out")
            if layer > 0:
                made["layers.norm2.bias"][layer - 1] -= mean
            else:
                first = PROJECTION[1] if PROJECTION[1] in made else "embeddings.norm.bias"
                made[first] -= mean
    return made


def _own_inputs(spec: EncoderSpec, encoder: Mapping[str, Tensor]) -> bool:
    """Whether each layer's `qkv` has a norm of its own before it, which the head does not read."""
    return len(encoder["layers.qkv.weight"]) == spec.num_layers
