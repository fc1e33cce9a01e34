"""The encoder of a traced file: its weights under names a person can read, on the op `encode`.

T tokens, B sequences, H hidden, E embedding, I intermediate, L layers, V vocabulary, P positions.
"""

# Annotations are read by TorchScript too, which cannot resolve strings: no __future__ import.
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ft_handler.errors import ModelError
from ft_handler.model.spec import EncoderSpec

TABLES = ("embeddings.word", "embeddings.position", "embeddings.token_type")
PROJECTION = ("embeddings.projection.weight", "embeddings.projection.bias")
RELATIVE_BIAS = "attention.relative_bias"
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
    """A linear layer's or a layer norm's weight and bias, or a stack of them over the layers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.register_buffer("weight", weights[f"{name}.weight"])
        self.register_buffer("bias", weights[f"{name}.bias"])

    def drop_weight(self) -> None:
        """Put nothing in the weight's place."""
        self.weight = torch.empty([0], dtype=self.weight.dtype, device=self.weight.device)


class Embeddings(nn.Module):
    """Tables `[V,E]`, `[P,E]`, `[types,E]`, their norm and, where E is not H, a projection."""

    word: Tensor
    position: Tensor
    token_type: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in TABLES:
            self.register_buffer(name.removeprefix("embeddings."), weights[name])
        self.norm = Parameters(weights, "embeddings.norm")
        projected = PROJECTION[0] in weights
        self.projection = Parameters(weights, "embeddings.projection") if projected else None


class Layers(nn.Module):
    """Parameters of all layers: weights `[L,N,K]`, biases `[L,N]`, norms `[L,H]`; L or 1."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.qkv = Parameters(weights, "layers.qkv")
        self.out = Parameters(weights, "layers.out")
        self.norm1 = Parameters(weights, "layers.norm1")
        self.up = Parameters(weights, "layers.up")
        self.down = Parameters(weights, "layers.down")
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
    shapes: list[list[int]]

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, Tensor]) -> None:
        """Take the tensors as they are; raises ModelError when one is missing or unknown."""
        super().__init__()
        names = weight_names(spec, PROJECTION[0] in weights)
        if set(weights) != set(names):
            missing = ", ".join(sorted(set(names) - set(weights))) or "none"
            unknown = ", ".join(sorted(set(weights) - set(names))) or "none"
            raise ModelError(f"an encoder's weights: missing {missing}; unknown {unknown}")
        self.embeddings = Embeddings(weights)
        self.layers = Layers(weights)
        self.attention = Attention(weights) if spec.relative_distance else None
        self.spec = spec.text(names)
        self.max_positions = int(weights["embeddings.position"].shape[0])
        self.options = ""
        self.prepared = []
        # Of the unpacked GEMM weights, once they are released.
        self.shapes = []

    def unpacked(self) -> list[Tensor]:
        """The GEMM weights as stored, empty once released."""
        weights = [
            self.layers.qkv.weight,
            self.layers.out.weight,
            self.layers.up.weight,
            self.layers.down.weight,
        ]
        projection = self.embeddings.projection
        if projection is not None:
            weights.append(projection.weight)
        return weights

    def is_prepared(self) -> bool:
        """Whether the GEMM weights are prepared for where the parameters are now."""
        if len(self.prepared) == 0:
            return False
        # All are prepared together and move together, so that one speaks for all of them.
        weight = self.layers.qkv.weight
        if len(self.shapes) > 0:
            weight = self.layers.qkv.bias.reshape([-1])[:1].expand(self.shapes[0])
        prepared: bool = torch.ops.fastertransformer.is_prepared(self.prepared[0], weight)
        return prepared

    @torch.jit.export
    def prepare(self) -> None:
        """Lay the GEMM weights out for the processor the parameters are on, if not done yet.

        Raises RuntimeError when that needs the unpacked weights and they were released.
        """
        if self.is_prepared():
            return
        if len(self.shapes) > 0:
            raise RuntimeError(
                "the encoder's unpacked weights were released, so it cannot move to another "
                "device, dtype or processor; load the model file again there (a file that was "
                "saved after the release has to be made again)"
            )
        self.prepared = [
            torch.ops.fastertransformer.prepare_weight(weight) for weight in self.unpacked()
        ]

    @torch.jit.export
    def release(self) -> None:
        """Prepare, then drop the unpacked GEMM weights: half the memory, no more moves or saves."""
        self.prepare()
        if len(self.shapes) > 0:
            return
        self.shapes = [list(weight.size()) for weight in self.unpacked()]
        self.layers.qkv.drop_weight()
        self.layers.out.drop_weight()
        self.layers.up.drop_weight()
        self.layers.down.drop_weight()
        projection = self.embeddings.projection
        if projection is not None:
            projection.drop_weight()

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
