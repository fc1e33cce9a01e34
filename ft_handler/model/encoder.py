"""The encoder of a traced file: its weights under names a person can read, on the op `encode`.

T tokens, B sequences, H hidden, E embedding, I intermediate, L layers, V vocabulary, P positions.
"""

# Annotations are read by TorchScript too, which cannot resolve strings: no __future__ import.
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ft_handler.errors import ModelError
from ft_handler.model.spec import EncoderSpec

TABLES = ("embeddings.word", "embeddings.position", "embeddings.token_type")
PROJECTION = ("embeddings.projection.weight", "embeddings.projection.bias")
RELATIVE_BIAS = "attention.relative_bias"
PRODUCTS = ("layers.qkv", "layers.out", "layers.up", "layers.down", "embeddings.projection")
"""What is a matrix product, in the order in which `Encoder.prepared` holds them."""
WEIGHTS = (
    *TABLES,
    "embeddings.norm.weight", "embeddings.norm.bias",
    "layers.qkv.weight", "layers.qkv.bias", "layers.out.weight", "layers.out.bias",
    "layers.norm1.weight", "layers.norm1.bias",
    "layers.up.weight", "layers.up.bias", "layers.down.weight", "layers.down.bias",
    "layers.norm2.weight", "layers.norm2.bias",
)  # fmt: skip
"""What every encoder has, in the order in which the op gets them; a projection comes after, and a
relative bias last."""
NARROW = ("narrow", "narrow_scale", "input_scale")
"""What the op gets of a product of 8-bit floats besides its float weight, behind all weights."""

Kept = Mapping[str, Sequence[int]]
"""Of products in 8 bits: their names as in PRODUCTS -> the layers in which they are floats."""


def weight_names(spec: EncoderSpec, projected: bool = False) -> tuple[str, ...]:
    """The names of an encoder's weights, in the order in which the op gets them.

    projected  whether there is a projection even where the embeddings have the hidden size
    """
    projection = PROJECTION if projected or spec.embedding_size != spec.hidden_size else ()
    return WEIGHTS + projection + ((RELATIVE_BIAS,) if spec.relative_distance else ())


def is_narrow(weights: Mapping[str, Tensor], product: str) -> bool:
    """Whether a product's weights are 8-bit floats."""
    weight = weights.get(f"{product}.weight")
    return weight is not None and weight.dtype == torch.float8_e4m3fn


def narrow_spec(
    spec: EncoderSpec, names: Sequence[str], weights: Mapping[str, Tensor], kept: Kept
) -> str:
    """The specification with the tensors that products of 8-bit floats take besides, if any is."""
    # A product that is kept in every layer takes none.
    rounded = [p for p in PRODUCTS if is_narrow(weights, p) and len(weights[f"{p}.weight"]) > 0]
    if not rounded:
        return ""
    text = spec.text([*names, *(f"{product}.{part}" for product in rounded for part in NARROW)])
    floats = ";".join(
        f"{product.removeprefix('layers.')}:{','.join(map(str, kept[product]))}"
        for product in rounded
        if kept[product]
    )
    return f"{text} floats={floats}" if floats else text


class Parameters(nn.Module):
    """A layer norm's weight and bias, or a stack of them over the layers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.register_buffer("weight", weights[f"{name}.weight"])
        self.register_buffer("bias", weights[f"{name}.bias"])


class Product(Parameters):
    """A linear layer's weight `[N,K]` and bias `[N]`, or a stack of them over the layers."""

    shape: list[int]

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        super().__init__(weights, name)
        self.shape = list(self.weight.shape)

    def prepare(self) -> Tensor:
        """The weight laid out for the processor it is on."""
        prepared: Tensor = torch.ops.fastertransformer.prepare_weight(self.weight)
        return prepared

    def is_prepared(self, prepared: Tensor) -> bool:
        """Whether this is what `prepare` makes where the parameters are now."""
        # Of the weight's shape and type without holding one, which may have been dropped.
        like = self.bias.reshape([-1])[:1].expand(self.shape)
        found: bool = torch.ops.fastertransformer.is_prepared(prepared, like)
        return found

    def serves_narrow(self) -> bool:
        """Whether the device has the products of 8-bit floats that it needs: none."""
        return True

    def narrow(self) -> list[Tensor]:
        """What such products take besides."""
        return []

    def drop(self) -> None:
        """Put nothing in the weight's place."""
        self.weight = self.weight.new_empty([0])


class RoundedProduct(Parameters):
    """A product of every layer, rounded to 8 bits but for those layers in which it is kept.

    weight  `[Lq,N,K]`; scale  fp32 `[Lq,N]`, what 1 is worth in the weights of each output
    kept    floats `[Lk,N,K]`; kept_layers  which of the Lq + Lk layers these are, in rising order
    bias    `[L,N]`, or `[N]` outside of the layers, where Lq + Lk is 1
    """

    scale: Tensor
    kept: Tensor
    kept_layers: list[int]
    shape: list[int]

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, kept_layers: Sequence[int]
    ) -> None:
        super().__init__(weights, name)
        self.register_buffer("scale", weights[f"{name}.scale"])
        self.register_buffer("kept", weights[f"{name}.kept"])
        self.kept_layers = list(kept_layers)
        self.shape = list(self.weight.shape)

    def dequantized(self) -> Tensor:
        """The float weights `[L,N,K]` or `[N,K]` in the bias's type."""
        layers = self.shape[0] + len(self.kept_layers)
        full = torch.empty(
            [layers, self.shape[1], self.shape[2]], dtype=self.bias.dtype, device=self.bias.device
        )
        rounded = 0
        for layer in range(layers):
            if layer in self.kept_layers:
                full[layer] = self.kept[layer - rounded]
            else:
                # Copied, not cast: TorchScript fuses casts on GPUs by a compiler of its own, which
                # knows no 8-bit floats.
                floats = torch.empty(
                    [self.shape[1], self.shape[2]], dtype=torch.float32, device=self.bias.device
                )
                floats.copy_(self.weight[rounded])
                full[layer] = floats * self.scale[rounded].unsqueeze(1)
                rounded += 1
        return full if self.bias.dim() == 2 else full[0]

    def like_dequantized(self) -> Tensor:
        """A tensor of the float weights' shape and type, of one element."""
        shape = [self.shape[0] + len(self.kept_layers), self.shape[1], self.shape[2]]
        one = self.bias.reshape([-1])[:1]
        return one.expand(shape if self.bias.dim() == 2 else shape[1:])

    def drop(self) -> None:
        """Put nothing in the weights' place."""
        self.weight = self.weight.new_empty([0])
        self.scale = self.scale.new_empty([0])
        self.kept = self.kept.new_empty([0])


class QuantizedProduct(RoundedProduct):
    """Of int8 weights, -127 to 127; a CPU rounds inputs by what they are, a GPU has floats."""

    # TorchScript reads the annotations of a class, not of those it is derived from.
    kept_layers: list[int]
    shape: list[int]

    def prepare(self) -> Tensor:
        """The weights laid out for the processor they are on: on a GPU as floats."""
        if self.bias.is_cuda:
            prepared: Tensor = torch.ops.fastertransformer.prepare_weight(self.dequantized())
            return prepared
        layered: Tensor = torch.ops.fastertransformer.prepare_layers(
            self.weight, self.scale.float(), self.kept, self.kept_layers
        )
        return layered

    def is_prepared(self, prepared: Tensor) -> bool:
        """Whether this is what `prepare` makes where the parameters are now."""
        if self.bias.is_cuda:
            like = self.like_dequantized()
        elif self.shape[0] > 0:
            like = self.weight.new_empty([1]).expand([self.shape[0], self.shape[1], self.shape[2]])
        else:
            like = self.kept.new_empty([1]).expand(
                [len(self.kept_layers), self.shape[1], self.shape[2]]
            )
        found: bool = torch.ops.fastertransformer.is_prepared(prepared, like)
        return found

    def serves_narrow(self) -> bool:
        """Whether the device has the products of 8-bit floats that it needs: none."""
        return True

    def narrow(self) -> list[Tensor]:
        """What such products take besides."""
        return []


class NarrowProduct(RoundedProduct):
    """Of e4m3 weights, and inputs that are rounded with a scale that is known beforehand.

    input_scale  fp32 `[Lq+Lk]`, what 1 is worth in a rounded input

    Everywhere there are float weights of it, for devices without such products and for batches
    that are too small for them.
    """

    input_scale: Tensor
    kept_layers: list[int]
    shape: list[int]

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, kept_layers: Sequence[int]
    ) -> None:
        super().__init__(weights, name, kept_layers)
        self.register_buffer("input_scale", weights[f"{name}.input_scale"])

    def prepare(self) -> Tensor:
        """The weights as floats, laid out for the processor they are on."""
        prepared: Tensor = torch.ops.fastertransformer.prepare_weight(self.dequantized())
        return prepared

    def is_prepared(self, prepared: Tensor) -> bool:
        """Whether this is what `prepare` makes where the parameters are now."""
        found: bool = torch.ops.fastertransformer.is_prepared(prepared, self.like_dequantized())
        return found

    def serves_narrow(self) -> bool:
        """Whether the device has the products of 8-bit floats that it needs."""
        if self.shape[0] == 0:
            return True
        served: bool = torch.ops.fastertransformer.serves_narrow(self.like_dequantized())
        return served

    def narrow(self) -> list[Tensor]:
        """What such products take besides: NARROW, in its order; layers that are kept are zeros."""
        if self.shape[0] == 0:
            return []
        layers = self.shape[0] + len(self.kept_layers)
        # A move to another float type may have changed these; e4m3 fits into all of them.
        weight = torch.zeros(
            [layers, self.shape[1], self.shape[2]],
            dtype=torch.float8_e4m3fn,
            device=self.bias.device,
        )
        scale = torch.zeros([layers, self.shape[1]], device=self.bias.device)
        inputs = self.input_scale.float()
        rounded = 0
        for layer in range(layers):
            if layer not in self.kept_layers:
                weight[layer].copy_(self.weight[rounded])
                scale[layer] = self.scale[rounded].float() * inputs[layer]
                rounded += 1
        return [torch.ops.fastertransformer.prepare_narrow(weight), scale, inputs]


def product_of(
    weights: Mapping[str, Tensor], name: str, kept: Kept
) -> Product | QuantizedProduct | NarrowProduct:
    """A product as the weights have it."""
    if name not in kept:
        return Product(weights, name)
    kind = NarrowProduct if is_narrow(weights, name) else QuantizedProduct
    return kind(weights, name, kept[name])


class Embeddings(nn.Module):
    """Tables `[V,E]`, `[P,E]`, `[types,E]`, their norm and, where E is not H, a projection."""

    word: Tensor
    position: Tensor
    token_type: Tensor

    def __init__(self, weights: Mapping[str, Tensor], kept: Kept) -> None:
        super().__init__()
        for name in TABLES:
            self.register_buffer(name.removeprefix("embeddings."), weights[name])
        self.norm = Parameters(weights, "embeddings.norm")
        projected = PROJECTION[0] in weights
        self.projection = product_of(weights, PRODUCTS[4], kept) if projected else None


class Layers(nn.Module):
    """Parameters of all layers: weights `[L,N,K]`, biases `[L,N]`, norms `[L,H]`; L or 1."""

    def __init__(self, weights: Mapping[str, Tensor], kept: Kept) -> None:
        super().__init__()
        self.qkv = product_of(weights, PRODUCTS[0], kept)
        self.out = product_of(weights, PRODUCTS[1], kept)
        self.norm1 = Parameters(weights, "layers.norm1")
        self.up = product_of(weights, PRODUCTS[2], kept)
        self.down = product_of(weights, PRODUCTS[3], kept)
        self.norm2 = Parameters(weights, "layers.norm2")

    def serves_narrow(self) -> bool:
        """Whether the device has the products of 8-bit floats that they need."""
        return (
            self.qkv.serves_narrow()
            and self.out.serves_narrow()
            and self.up.serves_narrow()
            and self.down.serves_narrow()
        )

    def narrow(self) -> list[Tensor]:
        """What these take besides, in the order of PRODUCTS."""
        return self.qkv.narrow() + self.out.narrow() + self.up.narrow() + self.down.narrow()


class Attention(nn.Module):
    """What all layers add to their scaled scores, by head and distance -D to D: `[heads, 2D+1]`."""

    relative_bias: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("relative_bias", weights[RELATIVE_BIAS])


class Encoder(nn.Module):
    """An encoder over packed tokens; parameters in the file's dtype, under names as in WEIGHTS.

    Weights prepared for the running processor are made at need and again after every move.
    """

    __constants__ = ("max_positions", "narrow_spec", "spec")

    prepared: list[Tensor]
    narrow: list[Tensor]

    def __init__(
        self, spec: EncoderSpec, weights: Mapping[str, Tensor], kept: Kept | None = None
    ) -> None:
        """Take the tensors as they are; raises ModelError when one is missing or unknown.

        kept  which products are in 8 bits, and in which layers they are floats; None: no product is
        """
        super().__init__()
        kept = kept or {}
        names = weight_names(spec, PROJECTION[0] in weights)
        wanted = {*names, *(f"{name}.{more}" for name in kept for more in ("scale", "kept"))}
        wanted |= {f"{name}.input_scale" for name in kept if is_narrow(weights, name)}
        if set(weights) != wanted:
            missing = ", ".join(sorted(wanted - set(weights))) or "none"
            unknown = ", ".join(sorted(set(weights) - wanted)) or "none"
            raise ModelError(f"an encoder's weights: missing {missing}; unknown {unknown}")
        self.embeddings = Embeddings(weights, kept)
        self.layers = Layers(weights, kept)
        self.attention = Attention(weights) if spec.relative_distance else None
        self.spec = spec.text(names)
        self.narrow_spec = narrow_spec(spec, names, weights, kept)
        self.max_positions = int(weights["embeddings.position"].shape[0])
        self.options = ""
        self.prepared = []
        self.narrow = []
        self.released = False

    def is_prepared(self) -> bool:
        """Whether the GEMM weights are prepared for where the parameters are now."""
        # All are prepared together and move together, so that one speaks for all of them.
        return (
            len(self.prepared) > 0
            and self.layers.qkv.is_prepared(self.prepared[0])
            and (len(self.narrow) > 0) == self.serves_narrow()
        )

    def serves_narrow(self) -> bool:
        """Whether there are products of 8-bit floats, and the device has them."""
        return len(self.narrow_spec) > 0 and self.layers.serves_narrow()

    @torch.jit.export
    def prepare(self) -> None:
        """Lay the GEMM weights out for the processor the parameters are on, if not done yet.

        Raises RuntimeError when that needs the unpacked weights and they were released.
        """
        if self.is_prepared():
            return
        if self.released:
            raise RuntimeError(
                "the encoder's unpacked weights were released, so it cannot move to another "
                "device, dtype or processor; load the model file again there (a file that was "
                "saved after the release has to be made again)"
            )
        self.prepared = [
            self.layers.qkv.prepare(),
            self.layers.out.prepare(),
            self.layers.up.prepare(),
            self.layers.down.prepare(),
        ]
        projection = self.embeddings.projection
        if projection is not None:
            self.prepared.append(projection.prepare())
        self.narrow = []
        if self.serves_narrow():
            self.narrow = self.layers.narrow()

    @torch.jit.export
    def release(self) -> None:
        """Prepare, then drop the unpacked GEMM weights: half the memory, no more moves or saves."""
        self.prepare()
        if self.released:
            return
        self.released = True
        self.layers.qkv.drop()
        self.layers.out.drop()
        self.layers.up.drop()
        self.layers.down.drop()
        projection = self.embeddings.projection
        if projection is not None:
            projection.drop()

    @torch.jit.export
    def configure(self, options: str) -> None:
        """How to run, in the words of `ops.encode`; a saved file keeps them."""
        self.options = options

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Ids `[T]`, `cu_seqlens [B+1]` -> hidden states `[T,H]` in the file's dtype."""
        self.prepare()
        weights = [
            self.embeddings.word,
            self.embeddings.position,
            self.embeddings.token_type,
            self.embeddings.norm.weight,
            self.embeddings.norm.bias,
            self.prepared[0],
            self.layers.qkv.bias,
            self.prepared[1],
            self.layers.out.bias,
            self.layers.norm1.weight,
            self.layers.norm1.bias,
            self.prepared[2],
            self.layers.up.bias,
            self.prepared[3],
            self.layers.down.bias,
            self.layers.norm2.weight,
            self.layers.norm2.bias,
        ]
        projection = self.embeddings.projection
        if projection is not None:
            weights.append(self.prepared[4])
            weights.append(projection.bias)
        attention = self.attention
        if attention is not None:
            weights.append(attention.relative_bias)
        spec = self.spec
        if len(self.narrow) > 0:
            weights += self.narrow
            spec = self.narrow_spec
        hidden: Tensor = torch.ops.fastertransformer.encode(
            input_ids,
            token_type_ids,
            position_ids,
            cu_seqlens,
            max_seqlen,
            weights,
            spec,
            self.options,
        )
        return hidden
