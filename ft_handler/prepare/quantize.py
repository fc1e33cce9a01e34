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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from ft_handler.prepare.rounding import rounded

#: Tokens that are measured, and as many that weights are rounded for; and of one batch.
MOST_TOKENS, BATCH_TOKENS = 4096, 1024


# -- weights -------------------------------------------------------------------------------------


Stacks = Mapping[str, tuple[Tensor, Tensor]]


def rounded_products(encoder: Mapping[str, Tensor], quantized: Quantized) -> tuple[str, ...]:
    """Every product that a precision rounds, such as "layers.down", of all layers at once."""
    products = PRODUCTS if quantized.projection else PRODUCTS[:-1]
    return tuple(product for product in products if f"{product}.weight" in encoder)


def rounded_stacks(encoder: Mapping[str, Tensor], quantized: Quantized) -> Stacks:
    """Each of these products -> all of its layers, every number rounded to the nearest."""
    return {
        product: rounded(layered(encoder[f"{product}.weight"]), quantized.dtype)
        for product in rounded_products(encoder, quantized)
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


def layered(weight: Tensor) -> Tensor:
    """A product's weight as a stack: one outside of the layers is a stack of one."""
    return weight if weight.dim() == 3 else weight.unsqueeze(0)


def stored(
    spec: EncoderSpec,
    encoder: Mapping[str, Tensor],
    precision: Precision,
    kept: Collection[str],
    stacks: Stacks | None = None,
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """An encoder's tensors as the file holds them, and the layers in which a product is kept.

    kept    names of products, as `product_names` gives them
    stacks  the products of all layers, rounded; None: to the nearest
    """
    quantized = precision.quantized
    assert quantized is not None
    tensors = {name: precision.stored(weight) for name, weight in encoder.items()}
    layers: dict[str, list[int]] = {}
    stacks = rounded_stacks(encoder, quantized) if stacks is None else stacks
    for product, (weight, scale) in stacks.items():
        name = f"{product}.weight"
        floats = kept_layers(kept, product, len(weight))
        others = [i for i in range(len(weight)) if i not in floats]
        stack = layered(encoder[name].detach())
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
    stacks  the products of all layers, rounded; None: to the nearest
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: Weights,
        head: HeadModule,
        precision: Precision,
        levels: int = twins.COARSEST_LEVELS,
        stacks: Stacks | None = None,
    ) -> None:
        assert precision.quantized is not None
        self._levels = levels
        encoder = {name: weight.detach().float() for name, weight in weights.encoder.items()}
        self.names = product_names(encoder, precision.quantized)
        self._order = weight_names(spec, PROJECTION[0] in encoder)
        self._spec, self._head = spec.text(self._order), head.eval()
        self.spec, self.precision = spec, precision
        self.encoder = encoder
        self._kept = precisions.get(precision.quantized.kept).dtype
        self._stored = {n: precision.stored(w).float() for n, w in encoder.items()}
        self.stacks = rounded_stacks(encoder, precision.quantized) if stacks is None else stacks
        self._input_scales = input_scales(spec, encoder, precision, self.stacks)

    def over(self, encoder: Mapping[str, Tensor], stacks: Stacks) -> Simulation:
        """Of the same model with other weights of its encoder, rounded already."""
        weights = Weights(encoder, {})
        return Simulation(self.spec, weights, self._head, self.precision, self._levels, stacks)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of weights of each product, in the order of `names`."""
        found = {
            _named(product, i): weight[0].numel()
            for product, (weight, _) in self.stacks.items()
            for i in range(len(weight))
        }
        return {name: found[name] for name in self.names}

    def exact(self, batch: Packed) -> Tensor:
        """Outputs in fp32: `[B,C]`, or `[C,T]` where outputs are for each token."""
        return self._outputs(batch, [self.encoder[name] for name in self._order])

    def alone(self, batch: Packed, product: str) -> Tensor:
        """Outputs of which this product alone is quantised."""
        others = [name for name in self.names if name != product]
        return self._outputs(batch, self._weights(self.encoder, others, torch.float32))

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
        weights: Sequence[twins.Weight] = [self.encoder[name] for name in self._order]
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
            if (product := name.removesuffix(".weight")) in self.stacks
            else rest[name]
            for name in self._order
        ]

    def _layers(
        self, product: str, kept: Collection[str], type_: torch.dtype, on_a_cpu: bool
    ) -> twins.Weight:
        weight, scale = self.stacks[product]
        stack = layered(self.encoder[f"{product}.weight"])
        floats = kept_layers(kept, product, len(stack))
        others = [i for i in range(len(stack)) if i not in floats]
        rest, rounded, scale = stack[floats].to(type_), picked(weight, others), scale[others]
        if product in self._input_scales:
            inputs = self._input_scales[product]
            if on_a_cpu:
                whole = (weight.float() * self.stacks[product][1].unsqueeze(-1)).half().float()
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
        self.simulation, self._batches, self._least = simulation, batches, least
        self._exact = [simulation.exact(batch) for batch in batches]

    def of(self, simulation: Simulation) -> Measured:
        """Of another simulation over the same batches."""
        return Measured(simulation, self._batches, self._least)

    @property
    def outputs(self) -> float:
        """What errors are a part of: the outputs' root mean square, or the least it counts as."""
        size = sum(float(exact.double().square().sum()) for exact in self._exact)
        count = sum(exact.numel() for exact in self._exact)
        return max(math.sqrt(size / max(count, 1)), self._least)

    def quantized(self, kept: Collection[str]) -> float:
        """With all products quantised but these."""
        return self._error(lambda batch: self.simulation.quantized(batch, kept), None)

    def on_a_cpu(self, kept: Collection[str]) -> float:
        """With all products quantised but these, on a CPU."""
        return self._error(lambda batch: self.simulation.on_a_cpu(batch, kept), None)

    def alone(self, product: str) -> float:
        """With one product quantised, over the first batch."""
        return self._error(lambda batch: self.simulation.alone(batch, product), 1)

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
    sizes: Mapping[str, int],
    precision: Precision,
    bound: float,
    say: Callable[[str], None],
) -> Choice:
    """As few weights to keep as it takes for outputs to be within `bound`.

    Errors of products that have nothing to do with one another add up by their squares, so those
    are kept first whose square is largest for what they take.

    sizes  the number of weights of each product, which its time goes with

    Raises ModelError where all of them would have to be kept.
    """
    assert precision.quantized is not None
    name, floats = precision.name, precision.quantized.kept
    error = measured.quantized(())
    if error <= bound:
        return Choice((), error)
    say(f"{name} changes the outputs by {error:.1%}, more than {100 * bound:g}%: measuring "
        f"{len(sizes)} products one by one")  # fmt: skip
    costs = {product: measured.alone(product) ** 2 / size for product, size in sizes.items()}
    ranked = sorted(sizes, key=lambda product: costs[product], reverse=True)
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
            f"{name} changes the outputs by more than {100 * bound:g}% unless every product is "
            f"kept in {floats}: take --data_type {floats}, or say with --keep_products which are "
            "to be kept"
        )
    return Choice(tuple(product for product in sizes if product in ranked[:high]), found)


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


@dataclass(frozen=True)
class Drawn:
    """Texts that products are measured on, and others, if there are any, to be rounded for."""

    measured: list[Packed]
    rounded_for: Packed | None

    @classmethod
    def of(cls, sequences: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Drawn:
        """Of ids and types, every other one for each, up to MOST_TOKENS for each."""
        drawn: list[tuple[Sequence[int], Sequence[int]]] = []
        total = 0
        for sequence in sequences:
            total += len(sequence[0])
            if drawn and total > 2 * MOST_TOKENS:
                break
            drawn.append(sequence)
        return cls(batches_of(drawn[::2]), Packed.of(drawn[1::2]) if drawn[1:] else None)


def of_texts(
    texts: Sequence[Mapping[str, str]], tokenizer: str, token_types: int, longest: int, seed: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Ids and types of texts and pairs, drawn from all of the file and cut to `longest` tokens.

    texts      by the keys of requests
    tokenizer  the text of a tokenizer.json
    """
    reader = Tokenizer.from_str(tokenizer)
    reader.enable_truncation(longest)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    for i in order:
        first = texts[i].get("text", texts[i].get("question", ""))
        second = texts[i].get("text_pair", texts[i].get("context"))
        read = reader.encode(first, second)
        if read.ids:
            yield read.ids, read.type_ids if token_types > 1 else [0] * len(read.ids)


def of_padded(
    ids: Tensor, mask: Tensor, types: Tensor
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Ids and types of padded `[B,S]` without their pads."""
    lengths = mask.sum(1).tolist()
    for row, kinds, n in zip(ids.tolist(), types.tolist(), lengths, strict=True):
        yield row[:n], kinds[:n]
