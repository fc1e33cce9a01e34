"""Products in 8 bits: how weights are rounded, and which products are kept as floats.

A weight is rounded with a scale an output: to whole numbers of -127 to 127, or to e4m3, floats of a
sign, 4 bits of exponent and 3 of mantissa that end at 448 (Micikevicius et al., arXiv 2209.05433).

Whole numbers are as far apart near zero as at their ends, so an input is rounded to them in the
product itself, with a step a row and slice of columns (`twins.quantized_product`). What makes that
coarse are outliers: a few columns of an input that are many times the others, which encoders are
known for. SmoothQuant (Xiao et al., arXiv 2211.10438) moves them into the weights by dividing the
layer norm that makes the input. Encoders of BERT's kind normalise after the residual is added, so
what that norm makes is the next residual too, and dividing it would change the sum. A step of its
own for each slice does not need that: an outlier coarsens its slice alone.

Floats are as near to a small number as to a large one, in proportion, over four orders of
magnitude. So one scale serves all of a product's inputs, whatever they are, as long as none lies
beyond the largest float: `ft_handler.prepare.input_scales` makes it of the weights alone.

A product that loses too much all the same is kept as floats of 16 bits, and which ones those are is
measured at the model's outputs, not guessed from weights.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ft_handler import precisions
from ft_handler.architectures.base import Weights, listed
from ft_handler.errors import ModelError
from ft_handler.model.encoder import PRODUCTS, PROJECTION, weight_names
from ft_handler.model.heads import HeadModule
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.precisions import Precision, Quantized
from ft_handler.prepare.input_scales import input_scales

#: Tokens of calibration that are measured, and of one batch of them.
MOST_TOKENS, BATCH_TOKENS = 4096, 1024


# -- weights -------------------------------------------------------------------------------------


def rounded(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float weight `[...,N,K]` as int8 of -127 to 127 or as e4m3, and its scale, fp32 `[...,N]`.

    The scale is what 1 is worth: the largest weight of an output is the type's largest number.
    """
    weight = weight.detach().float()
    floats = dtype.is_floating_point
    most = twins.LARGEST_NARROW if floats else twins.LEVELS
    largest = weight.abs().amax(-1)
    # A row of zeros takes any scale.
    scale = torch.where(largest > 0, largest / most, 1.0)
    steps = weight / scale.unsqueeze(-1)
    if floats:
        return steps.clamp(-most, most).to(dtype).contiguous(), scale
    return torch.round(steps).to(dtype).contiguous(), scale


Stacks = Mapping[str, tuple[Tensor, Tensor]]


def rounded_stacks(encoder: Mapping[str, Tensor], quantized: Quantized) -> Stacks:
    """Every product that a precision rounds: its name -> all of its layers, rounded."""
    products = PRODUCTS if quantized.projection else PRODUCTS[:-1]
    return {
        product: rounded(_layered(encoder[f"{product}.weight"]), quantized.dtype)
        for product in products
        if f"{product}.weight" in encoder
    }


def product_names(encoder: Mapping[str, Tensor], quantized: Quantized) -> tuple[str, ...]:
    """Every product that a precision rounds, such as "layers.3.down", in the order computed.

    Layers that share their weights have one of each, of layer 0.
    """
    projection, *layered = PRODUCTS[-1], *PRODUCTS[:-1]
    there = quantized.projection and f"{projection}.weight" in encoder
    layers = encoder[f"{layered[0]}.weight"].shape[0]
    return (
        *([projection] if there else []),
        *(_named(product, i) for i in range(layers) for product in layered),
    )


def _named(product: str, layer: int) -> str:
    """`layers.down`, 3 -> `layers.3.down`; a product outside of the layers is its own name."""
    group, _, name = product.partition(".")
    return f"{group}.{layer}.{name}" if group == "layers" else product


def kept_layers(kept: Collection[str], product: str, layers: int) -> list[int]:
    """The layers of which a product is among those kept."""
    return [i for i in range(layers) if _named(product, i) in kept]


def _layered(weight: Tensor) -> Tensor:
    """A product's weight as a stack: one outside of the layers is a stack of one."""
    return weight if weight.dim() == 3 else weight.unsqueeze(0)


def stored(
    spec: EncoderSpec, encoder: Mapping[str, Tensor], precision: Precision, kept: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """An encoder's tensors as the file holds them, and the layers in which a product is kept.

    kept  names of products, as `product_names` gives them
    """
    quantized = precision.quantized
    assert quantized is not None
    tensors = {name: precision.stored(weight) for name, weight in encoder.items()}
    layers: dict[str, list[int]] = {}
    stacks = rounded_stacks(encoder, quantized)
    for product, (weight, scale) in stacks.items():
        name = f"{product}.weight"
        floats = kept_layers(kept, product, len(weight))
        others = [i for i in range(len(weight)) if i not in floats]
        stack = _layered(encoder[name].detach())
        tensors[name], tensors[f"{product}.scale"] = picked(weight, others), scale[others]
        tensors[f"{product}.kept"] = precisions.get(quantized.kept).stored(stack[floats])
        layers[product] = floats
    for product, scales in input_scales(spec, encoder, precision, stacks).items():
        tensors[f"{product}.input_scale"] = scales
    return tensors, layers


def picked(weight: Tensor, layers: Sequence[int]) -> Tensor:
    """Some layers of a rounded stack; torch does not index 8-bit floats by lists."""
    return weight.view(torch.int8)[layers].view(weight.dtype)


# -- what it costs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end: ids and types `[T]`, `cu_seqlens [B+1]` int32, their longest."""

    input_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of(cls, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Packed:
        """Of the ids and the types of each sequence."""
        lengths = torch.tensor([0, *(len(ids) for ids, _ in sequences)])
        ids, types = (torch.tensor([n for s in sequences for n in s[part]]) for part in (0, 1))
        return cls(ids, types, lengths.cumsum(0).to(torch.int32), int(lengths.max()))


class Simulation:
    """The fused model in plain fp32 torch, with products exact, quantised or kept.

    levels  the largest magnitude of a quantised input; by default that of the processors on which a
            file loses most
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: Weights,
        head: HeadModule,
        precision: Precision,
        levels: int = twins.COARSEST_LEVELS,
    ) -> None:
        assert precision.quantized is not None
        self._levels = levels
        encoder = {name: weight.detach().float() for name, weight in weights.encoder.items()}
        self.names = product_names(encoder, precision.quantized)
        self._order = weight_names(spec, PROJECTION[0] in encoder)
        self._spec, self._head = spec.text(self._order), head.eval()
        self._exact = encoder
        self._kept = precisions.get(precision.quantized.kept).dtype
        self._stored = {n: precision.stored(w).float() for n, w in encoder.items()}
        self._rounded = rounded_stacks(encoder, precision.quantized)
        self._input_scales = input_scales(spec, encoder, precision, self._rounded)

    def exact(self, batch: Packed) -> Tensor:
        """Outputs in fp32: `[B,C]`, or `[C,T]` where outputs are for each token."""
        return self._outputs(batch, [self._exact[name] for name in self._order])

    def alone(self, batch: Packed, product: str) -> Tensor:
        """Outputs of which this product alone is quantised."""
        others = [name for name in self.names if name != product]
        return self._outputs(batch, self._weights(self._exact, others, torch.float32))

    def quantized(self, batch: Packed, kept: Collection[str]) -> Tensor:
        """Outputs of a file whose products are quantised but for these."""
        return self._outputs(batch, self._weights(self._stored, kept, self._kept))

    @property
    def differs_on_cpus(self) -> bool:
        """Whether a CPU computes such products otherwise: of 8-bit floats as plain floats."""
        return bool(self._input_scales)

    def on_a_cpu(self, batch: Packed, kept: Collection[str]) -> Tensor:
        """Outputs of such a file on a CPU."""
        return self._outputs(batch, self._weights(self._stored, kept, self._kept, on_a_cpu=True))

    def padded(
        self, kept: Collection[str] | None
    ) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """The same on a CPU behind a traced file's call: ids, mask and types -> the head's tuple.

        kept  None: in fp32, nothing is quantised
        """
        weights: Sequence[twins.Weight] = [self._exact[name] for name in self._order]
        if kept is not None:
            weights = self._weights(self._stored, kept, self._kept, on_a_cpu=True)

        def answer(ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, ...]:
            tokens, kinds, positions, places, bounds, longest = twins.remove_padding(
                ids, types, mask
            )
            hidden = twins.encode(tokens, kinds, positions, bounds, longest, weights, self._spec)
            logits = self._head(hidden, bounds)
            answered: tuple[Tensor, ...] = self._head.padded(logits, places, *ids.shape)
            return answered

        return answer

    def _weights(
        self,
        rest: Mapping[str, Tensor],
        kept: Collection[str],
        type_: torch.dtype,
        on_a_cpu: bool = False,
    ) -> list[twins.Weight]:
        """All weights in order; products are quantised, but those kept are in `type_`."""
        return [
            self._layers(product, kept, type_, on_a_cpu)
            if (product := name.removesuffix(".weight")) in self._rounded
            else rest[name]
            for name in self._order
        ]

    def _layers(
        self, product: str, kept: Collection[str], type_: torch.dtype, on_a_cpu: bool
    ) -> twins.Weight:
        weight, scale = self._rounded[product]
        stack = _layered(self._exact[f"{product}.weight"])
        floats = kept_layers(kept, product, len(stack))
        others = [i for i in range(len(stack)) if i not in floats]
        rest, rounded, scale = stack[floats].to(type_), picked(weight, others), scale[others]
        if product in self._input_scales:
            inputs = self._input_scales[product]
            if on_a_cpu:
                whole = (weight.float() * self._rounded[product][1].unsqueeze(-1)).half().float()
                whole[floats] = rest.float()
                return whole
            return twins.narrow_layers(rounded, scale, inputs, rest, floats)
        return twins.prepare_layers(rounded, scale, rest, floats, self._levels)

    def _outputs(self, batch: Packed, weights: Sequence[twins.Weight]) -> Tensor:
        with torch.inference_mode():
            hidden = twins.encode(
                batch.input_ids,
                batch.token_type_ids,
                None,
                batch.cu_seqlens,
                batch.longest,
                weights,
                self._spec,
            )
            outputs: Tensor = self._head(hidden, batch.cu_seqlens)
            return outputs


@dataclass(frozen=True)
class Choice:
    """Products that are kept as floats, and the outputs' error with them, as a part of outputs."""

    kept: tuple[str, ...]
    error: float


class Measured:
    """Errors of a simulation's outputs over batches.

    least  of the outputs' root mean square, where errors are taken as a part of that
    """

    def __init__(self, simulation: Simulation, batches: Sequence[Packed], least: float) -> None:
        self._simulation, self._batches, self._least = simulation, batches, least
        self._exact = [simulation.exact(batch) for batch in batches]

    @property
    def outputs(self) -> float:
        """What errors are a part of: the outputs' root mean square, or the least it counts as."""
        size = sum(float(exact.double().square().sum()) for exact in self._exact)
        count = sum(exact.numel() for exact in self._exact)
        return max(math.sqrt(size / max(count, 1)), self._least)

    def quantized(self, kept: Collection[str]) -> float:
        """With all products quantised but these."""
        return self._error(lambda batch: self._simulation.quantized(batch, kept), None)

    def on_a_cpu(self, kept: Collection[str]) -> float:
        """With all products quantised but these, on a CPU."""
        return self._error(lambda batch: self._simulation.on_a_cpu(batch, kept), None)

    def alone(self, product: str) -> float:
        """With one product quantised, over the first batch."""
        return self._error(lambda batch: self._simulation.alone(batch, product), 1)

    def _error(self, outputs: Callable[[Packed], Tensor], batches: int | None) -> float:
        apart = size = 0.0
        count = 0
        for batch, exact in zip(self._batches[:batches], self._exact[:batches], strict=True):
            apart += float((outputs(batch) - exact).double().square().sum())
            size += float(exact.double().square().sum())
            count += exact.numel()
        return math.sqrt(apart / max(size, count * self._least**2, 1e-30))


def choose(
    measured: Measured,
    names: Sequence[str],
    precision: Precision,
    bound: float,
    say: Callable[[str], None],
) -> Choice:
    """The fewest products to keep, those that cost most first, so that outputs are within `bound`.

    Raises ModelError where all of them would have to be kept.
    """
    assert precision.quantized is not None
    name, floats = precision.name, precision.quantized.kept
    error = measured.quantized(())
    if error <= bound:
        return Choice((), error)
    say(f"{name} changes the outputs by {error:.1%}, more than {bound:.0%}: measuring "
        f"{len(names)} products one by one")  # fmt: skip
    ranked = sorted(names, key=measured.alone, reverse=True)
    # Keeping more is taken to be no worse, so that the fewest are found by halving.
    low, high, found = 0, len(ranked), measured.quantized(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        error = measured.quantized(ranked[:middle])
        if error <= bound:
            high, found = middle, error
        else:
            low = middle
    if high == len(ranked):
        raise ModelError(
            f"{name} changes the outputs by more than {bound:.0%} unless every product is kept in "
            f"{floats}: take --data_type {floats}, or say with --keep_products which are to be kept"
        )
    return Choice(tuple(name for name in names if name in ranked[:high]), found)


def wished(wishes: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """The products that names and patterns such as `layers.*.down` mean; "none" means none.

    Raises ModelError for a wish that means no product.
    """
    wishes = [wish for wish in wishes if wish != "none"]
    for wish in wishes:
        if not fnmatch.filter(names, wish):
            raise ModelError(
                f"--keep_products {wish!r} is none of this model's products: "
                f"{listed(list(names), 9)}"
            )
    return tuple(name for name in names if any(fnmatch.fnmatch(name, wish) for wish in wishes))


# -- what it is measured on ----------------------------------------------------------------------


def batches_of(sequences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Packed]:
    """Ids and types of sequences in batches, up to MOST_TOKENS of them."""
    batches: list[list[tuple[Sequence[int], Sequence[int]]]] = [[]]
    total = here = 0
    for sequence in sequences:
        length = len(sequence[0])
        if batches[0] and total + length > MOST_TOKENS:
            break
        if batches[-1] and here + length > BATCH_TOKENS:
            batches.append([])
            here = 0
        batches[-1].append(sequence)
        total, here = total + length, here + length
    return [Packed.of(batch) for batch in batches if batch]


def of_texts(
    texts: Sequence[Mapping[str, str]], tokenizer: str, token_types: int, longest: int, seed: int
) -> list[Packed]:
    """Texts and pairs, drawn from all of the file and cut to `longest` tokens.

    texts      by the keys of requests
    tokenizer  the text of a tokenizer.json
    """
    reader = Tokenizer.from_str(tokenizer)
    reader.enable_truncation(longest)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()

    def sequences() -> Iterable[tuple[Sequence[int], Sequence[int]]]:
        for i in order:
            first = texts[i].get("text", texts[i].get("question", ""))
            second = texts[i].get("text_pair", texts[i].get("context"))
            read = reader.encode(first, second)
            if read.ids:
                yield read.ids, read.type_ids if token_types > 1 else [0] * len(read.ids)

    return batches_of(sequences())


def of_padded(ids: Tensor, mask: Tensor, types: Tensor) -> list[Packed]:
    """Padded `[B,S]` without their pads."""
    lengths = mask.sum(1).tolist()
    rows = zip(ids.tolist(), types.tolist(), lengths, strict=True)
    return batches_of((row[:n], kinds[:n]) for row, kinds, n in rows)
