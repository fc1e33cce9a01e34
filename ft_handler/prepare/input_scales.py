"""What 1 is worth in the inputs of products in 8-bit floats, made of an encoder's weights alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ft_handler.model.encoder import PROJECTION
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.precisions import Precision

#: By how much of itself rounding to e4m3 changes a number at most, and how far its least numbers
#: are apart.
NARROW_ERROR, NARROW_STEP = 2.0**-4, 2.0**-9


@dataclass(frozen=True)
class Reach:
    """All that an input can be: `slope @ z + centre` of any z that a layer norm makes.

    Before it is multiplied by its weight, what a layer norm makes of n numbers has the mean 0 and
    at most the length sqrt(n).

    slope   `[K,n]`, or `[K]` where it is a diagonal
    centre  `[K]`
    """

    slope: Tensor
    centre: Tensor

    def through(self, weight: Tensor, bias: Tensor) -> Reach:
        """What a product `[N,K]` makes of it."""
        slope = weight * self.slope if self.slope.dim() == 1 else weight @ self.slope
        return Reach(slope, weight @ self.centre + bias)

    @property
    def most(self) -> Tensor:
        """The largest magnitude of each column, `[K]`, by Cauchy and Schwarz; z can attain it."""
        if self.slope.dim() == 1:
            # All but one of a row's numbers may be the same.
            return math.sqrt(len(self.slope) - 1) * self.slope.abs() + self.centre.abs()
        level = self.slope - self.slope.mean(1, keepdim=True)
        reach: Tensor = math.sqrt(self.slope.shape[1]) * vector_norm(level, dim=1)
        return reach + self.centre.abs()

    def sizes(self, weight: Tensor) -> Tensor:
        """What the sum of `|w x|` over a row of weights `[N,K]` is at most, `[N]`."""
        if self.slope.dim() == 1:
            reach: Tensor = math.sqrt(len(self.slope)) * vector_norm(weight * self.slope, dim=1)
            return reach + weight.abs() @ self.centre.abs()
        return weight.abs() @ self.most


def input_scales(
    spec: EncoderSpec,
    encoder: Mapping[str, Tensor],
    precision: Precision,
    stacks: Mapping[str, tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """What 1 is worth in the inputs of each product in 8-bit floats, fp32 `[L]` by product.

    No input lies beyond the largest float, whatever the text is, since each scale is made of what
    the weights allow at most:

    - `qkv` and `up` read what a layer norm makes, of which every column is bounded (`Reach.most`);
      without a norm in between, what the embeddings' projection makes of such a row.
    - `out` reads attention, a mean of values, and no mean is larger than the largest. Values are a
      product of a norm's output, so `Reach.through` says how large they get.
    - `down` reads the activation of `up`, a product of a norm's output too, and no activation here
      is larger in magnitude than what it is given.

    A product is computed of inputs that are rounded themselves, each by a 16th of itself at most,
    which adds a 16th of `Reach.sizes`. Roundings in 16 bits need no room: what is up to 3.5 %
    beyond the largest float is rounded to that, so that nothing is lost.

    Precisions that round inputs by what they are have none.

    stacks  every rounded product's weights of all layers, and their scales
    """
    quantized = precision.quantized
    if quantized is None or not quantized.dtype.is_floating_point:
        return {}
    named = {name: precision.stored(weight).float() for name, weight in encoder.items()}
    forms = {
        product: (weight.float() * scale.unsqueeze(-1), named[f"{product}.weight"])
        for product, (weight, scale) in stacks.items()
    }
    most = {product: forms[product][0].new_zeros(len(forms[product][0])) for product in forms}

    def norm(name: str, layer: int) -> Reach:
        gamma, beta = (_layered_norm(named[f"{name}.{part}"]) for part in ("weight", "bias"))
        return Reach(gamma[layer % len(gamma)], beta[layer % len(beta)])

    def reads(product: str, layer: int, largest: Tensor) -> None:
        """Take note of a product's input; layers that share a product share its scale."""
        place = layer % len(most[product])
        most[product][place] = torch.maximum(most[product][place], largest.max())

    def makes(product: str, layer: int, given: Reach) -> Tensor:
        """The largest magnitude of each output, be the product rounded or kept, `[N]`."""
        biases = named[f"{product}.bias"]
        bias = biases[layer % len(biases)]
        step = NARROW_STEP / twins.LARGEST_NARROW * most[product][layer % len(most[product])]
        outputs = []
        for stack in forms[product]:
            weight = stack[layer % len(stack)]
            error = NARROW_ERROR * given.sizes(weight) + step / 2 * weight.abs().sum(1)
            outputs.append(given.through(weight, bias).most + error)
        return torch.maximum(*outputs)

    embedded = norm("embeddings.norm", 0)
    if PROJECTION[0] in named:
        embedded = embedded.through(*(named[name] for name in PROJECTION))
    layers = range(spec.num_layers)
    inputs = [embedded, *(norm("layers.norm2", layer) for layer in layers)]
    middles = [norm("layers.norm1", layer) for layer in layers]
    for layer in layers:
        reads("layers.qkv", layer, inputs[layer].most)
        reads("layers.up", layer, middles[layer].most)
    for layer in layers:
        values = makes("layers.qkv", layer, inputs[layer])[2 * spec.hidden_size :]
        reads("layers.out", layer, values)
        reads("layers.down", layer, makes("layers.up", layer, middles[layer]))
    # Inputs that are always zero take any scale.
    return {p: torch.where(m > 0, m / twins.LARGEST_NARROW, 1.0) for p, m in most.items()}


def _layered_norm(parameter: Tensor) -> Tensor:
    """A norm's parameter as a stack: one outside of the layers is a stack of one."""
    return parameter if parameter.dim() == 2 else parameter.unsqueeze(0)
