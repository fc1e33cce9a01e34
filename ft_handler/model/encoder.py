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


def weight_names(spec: EncoderSpec, projected: bool = False) -> tuple[str, ...]:
    """The names of an encoder's weights, in the order in which the op gets them.

    projected  whether there is a projection even where the embeddings have the hidden size
    """
    projection = PROJECTION if projected or spec.embedding_size != spec.hidden_size else ()
    return WEIGHTS + projection + ((RELATIVE_BIAS,) if spec.relative_distance else ())


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

    def drop(self) -> None:
        """Put nothing in the weight's place."""
        self.weight = self.weight.new_empty([0])


class QuantizedProduct(Parameters):
    """A product of every layer, in int8 but for those layers in which it is kept as floats.

    weight  int8 `[Lq,N,K]`, -127 to 127; scale  fp32 `[Lq,N]`, what a step of each output is
    kept    `[Lk,N,K]`; kept_layers  which of the Lq + Lk layers these are, in rising order
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
        """The float weights `[L,N,K]` or `[N,K]` in the bias's type, for GPUs."""
        layers = self.shape[0] + len(self.kept_layers)
        full = torch.empty(
            [layers, self.shape[1], self.shape[2]], dtype=self.bias.dtype, device=self.bias.device
        )
        quantized = 0
        for layer in range(layers):
            if layer in self.kept_layers:
                full[layer] = self.kept[layer - quantized]
            else:
                full[layer] = self.weight[quantized] * self.scale[quantized].unsqueeze(1)
                quantized += 1
        return full if self.bias.dim() == 2 else full[0]

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
        shape = [self.shape[0], self.shape[1], self.shape[2]]
        if self.bias.is_cuda:
            shape[0] += len(self.kept_layers)
            like = self.bias.reshape([-1])[:1].expand(shape if self.bias.dim() == 2 else shape[1:])
        elif shape[0] > 0:
            like = self.weight.new_empty([1]).expand(shape)
        else:
            shape[0] = len(self.kept_layers)
            like = self.kept.new_empty([1]).expand(shape)
        found: bool = torch.ops.fastertransformer.is_prepared(prepared, like)
        return found

    def drop(self) -> None:
        """Put nothing in the weights' place."""
        self.weight = self.weight.new_empty([0])
        self.scale = self.scale.new_empty([0])
        self.kept = self.kept.new_empty([0])


Kept = Mapping[str, Sequence[int]]
"""Of products in int8: their names as in PRODUCTS -> the layers in which they are floats."""


def product_of(weights: Mapping[str, Tensor], name: str, kept: Kept) -> Product | QuantizedProduct:
    """A product as the weights have it."""
    return QuantizedProduct(weights, name, kept[name]) if name in kept else Product(weights, name)


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

    __constants__ = ("max_positions", "spec")

    prepared: list[Tensor]

    def __init__(
        self, spec: EncoderSpec, weights: Mapping[str, Tensor], kept: Kept | None = None
    ) -> None:
        """Take the tensors as they are; raises ModelError when one is missing or unknown.

        kept  which products are in int8, and in which layers they are floats; None: no product is
        """
        super().__init__()
        kept = kept or {}
        names = weight_names(spec, PROJECTION[0] in weights)
        wanted = {*names, *(f"{name}.{more}" for name in kept for more in ("scale", "kept"))}
        if set(weights) != wanted:
            missing = ", ".join(sorted(wanted - set(weights))) or "none"
            unknown = ", ".join(sorted(set(weights) - wanted)) or "none"
            raise ModelError(f"an encoder's weights: missing {missing}; unknown {unknown}")
        self.embeddings = Embeddings(weights, kept)
        self.layers = Layers(weights, kept)
        self.attention = Attention(weights) if spec.relative_distance else None
        self.spec = spec.text(names)
        self.max_positions = int(weights["embeddings.position"].shape[0])
        self.options = ""
        self.prepared = []
        self.released = False

    def is_prepared(self) -> bool:
        """Whether the GEMM weights are prepared for where the parameters are now."""
        # All are prepared together and move together, so that one speaks for all of them.
        return len(self.prepared) > 0 and self.layers.qkv.is_prepared(self.prepared[0])

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
        hidden: Tensor = torch.ops.fastertransformer.encode(
            input_ids,
            token_type_ids,
            position_ids,
            cu_seqlens,
            max_seqlen,
            weights,
            self.spec,
            self.options,
        )
        return hidden
