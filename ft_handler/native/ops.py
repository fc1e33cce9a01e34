"""Typed wrappers of the ops, and their fake kernels for torch.compile and torch.export.

Importing this module loads the library. Shapes: T tokens, B sequences, S padded length, H hidden,
I intermediate, L layers, N outputs, K inputs, V vocabulary, P positions. Float tensors are fp32,
fp16 or bf16 and agree with each other; ids are int64 or int32; `cu_seqlens` is int32. On the CPU
wrong values raise RuntimeError in words; on CUDA, where checking them would wait, ids outside their
tables make their rows NaN, and a `cu_seqlens` that is none makes all rows NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from ft_handler.native.library import NAMESPACE, load_library

load_library()
_ops = getattr(torch.ops, NAMESPACE)


def prepare_weight(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Lay a GEMM weight `[L,N,K]` or `[N,K]` out for the running processor; opaque on the CPU.

    `scale` must be None: `prepare_layers` takes quantised weights.
    """
    return cast(Tensor, _ops.prepare_weight(weight, scale))


def prepare_layers(
    quantized: Tensor, scale: Tensor, kept: Tensor, kept_layers: list[int]
) -> Tensor:
    """Lay a product of every layer out for the running CPU, in int8 but for layers that are kept.

    quantized    int8 `[Lq,N,K]` of -127 to 127; `scale` fp32 `[Lq,N]`, what a step is worth
    kept         float `[Lk,N,K]`; `kept_layers`, in rising order, which of the Lq + Lk these are

    The result goes where `prepare_weight`'s goes. Inputs are rounded inside of the product, row by
    row and slice of K by slice (see `ft_handler.native.twins.quantized_product`).
    """
    return cast(Tensor, _ops.prepare_layers(quantized, scale, kept, kept_layers))


def prepare_narrow(weight: Tensor) -> Tensor:
    """An e4m3 weight `[L,N,K]`, K a multiple of 16, as `encode` takes it for a product of those.

    Only the order of columns changes: see `ft_handler.native.twins.prepare_narrow`.
    """
    return cast(Tensor, _ops.prepare_narrow(weight))


def serves_narrow(like: Tensor) -> bool:
    """Whether `encode` multiplies 8-bit floats for such a float weight `[L,N,K]`; no CPU does.

    Asked with a tensor of the weight's device, type and shape, whatever it holds.
    """
    return cast(bool, _ops.serves_narrow(like))


def is_prepared(prepared: Tensor, weight: Tensor) -> bool:
    """Whether `prepared` is what `prepare_weight` makes of such a weight here, by its header.

    Of layers it is asked with `quantized`, or with `kept` where no layer is quantised.

    False after a move to another device, dtype, shape or processor; the numbers are not compared.
    """
    return cast(bool, _ops.is_prepared(prepared, weight))


def remove_padding(
    input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Pack the tokens that the mask keeps: three `[B,S]` in.

    Returns `input_ids [T]`, `token_type_ids [T]`, `position_ids [T]` int32, `token_indices [T]`
    int64 (`b * S + s`), `cu_seqlens [B+1]` and the longest length. Column 0 must be kept.
    """
    return cast(
        "tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]",
        _ops.remove_padding(input_ids, token_type_ids, attention_mask),
    )


def restore_padding(
    packed: Tensor, token_indices: Tensor, batch: int, seqlen: int, fill: float
) -> Tensor:
    """Put packed rows back: `[T,...]` -> `[B,S,...]`, pads equal `fill`."""
    return cast(Tensor, _ops.restore_padding(packed, token_indices, batch, seqlen, fill))


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """Layer norm of the three summed embeddings: ids `[T]`, tables `[V|P|types,H]` -> `[T,H]`."""
    return cast(
        Tensor,
        _ops.embedding_layer_norm(
            input_ids,
            token_type_ids,
            position_ids,
            cu_seqlens,
            word,
            position,
            token_type,
            gamma,
            beta,
            eps,
        ),
    )


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "",
) -> Tensor:
    """`input @ weight.T + bias`, activated, then `+ residual`: `[T,K]` -> `[T,N]`.

    `weight` is what `prepare_weight` made of `[N,K]`; `activation` is "gelu" (erf), "gelu_tanh",
    "relu", "silu" or empty.
    """
    return cast(Tensor, _ops.linear(input, weight, bias, residual, activation))


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """Attention within each sequence: `[T,3H]` (q, k, v, each `[heads, head size]`) -> `[T,H]`.

    `relative_bias` `[heads, 2D+1]` is added to the scaled scores: for query i and key j its column
    `clamp(j - i, -D, D) + D`.
    """
    return cast(
        Tensor, _ops.varlen_attention(qkv, cu_seqlens, max_seqlen, num_heads, relative_bias)
    )


def residual_layer_norm(
    input: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """Layer norm of `input + bias + residual`: `[T,H]` -> `[T,H]`."""
    return cast(Tensor, _ops.residual_layer_norm(input, bias, residual, gamma, beta, eps))


def bias_activation(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The activation of `input + bias`, one of those `linear` has: `[T,N]` -> `[T,N]`."""
    return cast(Tensor, _ops.bias_activation(input, bias, activation))


def segment_pool(input: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """The "mean" or "max" of each sequence's rows: `[T,H]` -> fp32 `[B,H]`, zeros for empty ones.

    Summed in fp32, row by row, so that a result depends on its sequence alone, to the last bit.
    """
    return cast(Tensor, _ops.segment_pool(input, cu_seqlens, how))


def encode(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: list[Tensor],
    spec: str,
    options: str = "",
) -> Tensor:
    """The whole encoder: ids `[T]` -> `[T,H]` in the dtype of the word table.

    weights  in the order of `spec`; GEMM weights are what `prepare_weight` made of them. On devices
             of which `serves_narrow` is true, products of 8-bit floats may come beside them, as
             `ft_handler.native.twins.encode` says
    spec     sizes and names, as `ft_handler.model.spec.EncoderSpec.text` writes them
    options  words apart by blanks: `batch_invariant` (results do not depend on the batch, to the
             last bit) and `few_tokens=0` (no kernels of their own for a few tokens)
    """
    return cast(
        Tensor,
        _ops.encode(
            input_ids,
            token_type_ids,
            position_ids,
            cu_seqlens,
            max_seqlen,
            weights,
            spec,
            options,
        ),
    )


_Kernel = TypeVar("_Kernel", bound=Callable[..., object])


def _fake(name: str) -> Callable[[_Kernel], _Kernel]:
    return cast("Callable[[_Kernel], _Kernel]", torch.library.register_fake(f"{NAMESPACE}::{name}"))


@_fake("prepare_weight")
def _prepare_weight_fake(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    if weight.device.type != "cpu":
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    # How many bytes the packed form takes depends on the processor.
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(size, dtype=torch.uint8)


@_fake("prepare_layers")
def _prepare_layers_fake(
    quantized: Tensor, scale: Tensor, kept: Tensor, kept_layers: list[int]
) -> Tensor:
    return quantized.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@_fake("prepare_narrow")
def _prepare_narrow_fake(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


# remove_padding, is_prepared and serves_narrow have none: they return a plain number that depends
# on what tensors hold or where they are, which no symbolic trace can know. They run once, before
# the part worth compiling.


@_fake("restore_padding")
def _restore_padding_fake(
    packed: Tensor, token_indices: Tensor, batch: int, seqlen: int, fill: float
) -> Tensor:
    return packed.new_empty((batch, seqlen, *packed.shape[1:]))


@_fake("embedding_layer_norm")
def _embedding_layer_norm_fake(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    return word.new_empty((input_ids.shape[0], word.shape[1]))


@_fake("linear")
def _linear_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "",
) -> Tensor:
    outputs: int | torch.SymInt
    if bias is not None:
        outputs = bias.shape[0]
    elif residual is not None:
        outputs = residual.shape[1]
    elif weight.dtype != torch.uint8:
        outputs = weight.shape[-2]
    else:  # the blob's header knows, its shape does not
        outputs = torch.library.get_ctx().new_dynamic_size()
    return input.new_empty((input.shape[0], outputs))


@_fake("varlen_attention")
def _varlen_attention_fake(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    relative_bias: Tensor | None = None,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))


@_fake("residual_layer_norm")
def _residual_layer_norm_fake(
    input: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@_fake("bias_activation")
def _bias_activation_fake(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@_fake("segment_pool")
def _segment_pool_fake(input: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    return input.new_empty((cu_seqlens.shape[0] - 1, input.shape[1]), dtype=torch.float32)


@_fake("encode")
def _encode_fake(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: list[Tensor],
    spec: str,
    options: str,
) -> Tensor:
    words = dict(word.split("=", 1) for word in spec.split())
    table = weights[words["weights"].split(",").index("embeddings.word")]
    return table.new_empty((input_ids.shape[0], int(words["hidden"])))


# Interface 1: files of format 1 call it.
@_fake("encoder")
def _encoder_fake(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    word: Tensor,
    *_: object,
) -> Tensor:
    return word.new_empty((input_ids.shape[0], word.shape[1]))
