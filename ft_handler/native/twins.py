"""Eager fp32 twins of the ops, in plain torch: what every kernel is held against.

Names, arguments and shapes are those of the ops. Inputs of any float type are raised to fp32
first and results are fp32, so the twin of a half-precision op is its exact answer up to fp32
rounding. T tokens, B sequences, H hidden, I intermediate, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def prepare_weight(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The twin's GEMM wants no other layout: `[L,N,K]` or `[N,K]` in fp32, without a scale."""
    if scale is not None:
        raise ValueError("scale must be None for a float weight")
    return weight.float()


#: The largest magnitude of a quantised weight, and of an input on most processors.
LEVELS = 127
#: Of an input on processors whose products of bytes are summed in pairs of 16 bits.
COARSEST_LEVELS = 64
_PAIRS = ("avx2", "avx512")
#: The most columns of one slice.
MOST_SLICE = 512


def input_levels(isa: str) -> int:
    """The largest magnitude of a quantised input, by what `build_info` calls the processor."""
    return COARSEST_LEVELS if isa in _PAIRS else LEVELS


def slice_length(columns: int) -> int:
    """Columns of each slice but the last: as equal as multiples of 64 allow, at most MOST_SLICE."""
    return math.ceil(columns / math.ceil(columns / MOST_SLICE) / 64) * 64


#: Of one layer's product that is rounded: inputs `[T,K]` -> `[T,N]`.
Rounded = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PreparedLayers:
    """A product of every layer: rounded to 8 bits, or kept as a float weight `[N,K]`."""

    layers: tuple[Rounded | Tensor, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> PreparedLayers:
        """One layer's product."""
        return PreparedLayers((self.layers[index],))


Weight = Tensor | PreparedLayers
_W = TypeVar("_W", bound=Weight)


def _layered(
    rounded: Iterable[Rounded], kept: Tensor, kept_layers: Sequence[int], total: int
) -> PreparedLayers:
    """Those that are rounded and those that are kept, in the layers' order."""
    products, floats = iter(rounded), dict(zip(kept_layers, kept.float(), strict=True))
    layers = (floats[i] if i in floats else next(products) for i in range(total))
    return PreparedLayers(tuple(layers))


def prepare_layers(
    quantized: Tensor,
    scale: Tensor,
    kept: Tensor,
    kept_layers: Sequence[int],
    levels: int = LEVELS,
) -> PreparedLayers:
    """Products by layer: `quantized` int8 `[Lq,N,K]`, `scale [Lq,N]`, `kept [Lk,N,K]`.

    kept_layers  which of the Lq + Lk layers are kept, in rising order
    levels       the largest magnitude of a quantised input, which is the processor's to choose
    """
    products = (
        partial(quantized_product, quantized=whole, scale=step, levels=levels)
        for whole, step in zip(quantized, scale.float(), strict=True)
    )
    return _layered(products, kept, kept_layers, len(quantized) + len(kept))


def quantized_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Rows `[T,K]` as whole numbers of at most `levels`, and what a step of each is worth `[T,1]`.

    Rows below 2^-100 throughout become zeros, those with a number that is not finite NaN.
    """
    most = x.abs().amax(1, keepdim=True)
    small = most < 2.0**-100
    step = torch.where(small, 0.0, most / levels)
    step = torch.where(torch.isfinite(most), step, math.nan)
    return torch.where(small, 0.0, torch.round(x * (levels / most))), step


def quantized_product(x: Tensor, quantized: Tensor, scale: Tensor, levels: int = LEVELS) -> Tensor:
    """`x @ (quantized * scale).T` with the inputs rounded slice by slice: `[T,K]` -> `[T,N]`.

    A row's inputs have a step of their own in each slice of K, so that a column of outliers
    coarsens its slice alone. Sums in a slice are those of whole numbers, across slices fp32.
    """
    length = slice_length(x.shape[1])
    out = torch.zeros(x.shape[0], quantized.shape[0], device=x.device)
    for inputs, weight in zip(
        torch.split(x.float(), length, dim=1), torch.split(quantized, length, dim=1), strict=True
    ):
        rows, step = quantized_rows(inputs, levels)
        out += (rows @ weight.float().T) * step
    return out * scale


#: The largest number of e4m3 (Micikevicius et al., arXiv 2209.05433).
LARGEST_NARROW = 448.0
#: Columns among which `prepare_narrow` reorders.
NARROW_GROUP = 16


def narrowed(x: Tensor, scale: Tensor | float) -> Tensor:
    """The nearest e4m3 numbers of `x / scale`, at most LARGEST_NARROW; NaN stays NaN."""
    most = LARGEST_NARROW
    return (x.float() / scale).clamp(-most, most).to(torch.float8_e4m3fn)


def narrow_product(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor) -> Tensor:
    """A product of 8-bit floats: `[T,K]` by e4m3 `[N,K]`, sums in fp32 -> `[T,N]`.

    scale        `[N]`, what a sum of 1 is worth: a weight of 1 times an input of 1
    input_scale  what an input of 1 is worth, the same for all inputs
    """
    return (narrowed(x, input_scale).float() @ weight.float().T) * scale


def narrow_layers(
    weight: Tensor,
    scale: Tensor,
    input_scale: Tensor,
    kept: Tensor,
    kept_layers: Sequence[int],
) -> PreparedLayers:
    """Products by layer: `weight` e4m3 `[Lq,N,K]`, `scale [Lq,N]`, `kept [Lk,N,K]`.

    scale        what a weight of 1 is worth
    input_scale  `[Lq+Lk]`, what an input of 1 is worth
    kept_layers  which of the Lq + Lk layers are kept, in rising order
    """
    total = len(weight) + len(kept)
    steps = input_scale[[i for i in range(total) if i not in kept_layers]]
    products = (
        partial(narrow_product, weight=narrow, scale=unit * step, input_scale=step)
        for narrow, unit, step in zip(weight, scale.float(), steps, strict=True)
    )
    return _layered(products, kept, kept_layers, total)


def prepare_narrow(weight: Tensor) -> Tensor:
    """An e4m3 weight `[L,N,K]` in the order of columns that the kernels read.

    Of each 16 columns, places 4q to 4q+3 hold columns 2q, 2q+1, 8+2q and 8+2q+1, which are what one
    thread multiplies.
    """
    halves = weight.reshape(*weight.shape[:2], -1, 2, NARROW_GROUP // 4, 2)
    return halves.transpose(3, 4).reshape(weight.shape)


def _unprepared(prepared: Tensor) -> Tensor:
    """What `prepare_narrow` was given."""
    quads = prepared.reshape(*prepared.shape[:2], -1, NARROW_GROUP // 4, 2, 2)
    return quads.transpose(3, 4).reshape(prepared.shape)


def is_prepared(prepared: Tensor, weight: Tensor) -> bool:
    """Whether `prepared` may be what `prepare_weight` made of `weight`: its shape, in fp32."""
    return (
        prepared.dtype == torch.float32
        and prepared.shape == weight.shape
        and prepared.device == weight.device
    )


def remove_padding(
    input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Keep the tokens the mask keeps, row by row: three `[B,S]` in.

    Returns `input_ids [T]`, `token_type_ids [T]`, `position_ids [T]` (int32, the column, so that a
    mask with holes keeps its positions), `token_indices [T]` (int64, `b * S + s`), `cu_seqlens
    [B+1]` (int32) and the longest length. A row that keeps no token, or drops its first one,
    which the head reads, raises ValueError.
    """
    kept = attention_mask != 0
    batch, seqlen = kept.shape
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=kept.device)
    if batch == 0 or seqlen == 0:
        empty = input_ids.new_empty(0)
        return (
            empty,
            token_type_ids.new_empty(0),
            empty.to(torch.int32),
            empty.to(torch.int64),
            cu_seqlens,
            0,
        )
    lengths = kept.sum(1)
    if bool((lengths == 0).any()):
        raise ValueError("attention_mask: a row keeps no token")
    if not bool(kept[:, 0].all()):
        raise ValueError("attention_mask: column 0 must be kept, the head reads it")
    cu_seqlens[1:] = lengths.cumsum(0)
    token_indices = kept.reshape(-1).nonzero().squeeze(1)
    return (
        input_ids.reshape(-1)[token_indices],
        token_type_ids.reshape(-1)[token_indices],
        (token_indices % seqlen).to(torch.int32),
        token_indices,
        cu_seqlens,
        int(lengths.max()),
    )


def restore_padding(
    packed: Tensor, token_indices: Tensor, batch: int, seqlen: int, fill: float
) -> Tensor:
    """Put packed rows `[T,...]` back where they came from: `[B,S,...]`, pads equal `fill`."""
    out = packed.new_full((batch * seqlen, *packed.shape[1:]), fill)
    out[token_indices.long()] = packed
    return out.reshape(batch, seqlen, *packed.shape[1:])


def positions_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """Positions counted from 0 within each sequence, int64 `[T]`."""
    out = torch.zeros(total, dtype=torch.int64, device=cu_seqlens.device)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        out[start:end] = torch.arange(end - start, device=cu_seqlens.device)
    return out


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * gamma + beta` over the last axis, in fp32."""
    return F.layer_norm(x.float(), (x.shape[-1],), gamma.float(), beta.float(), eps)


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
    """Layer norm of the sum of three table rows.

    Ids `[T]`; tables `[V,H]`, `[P,H]`, `[types,H]` -> `[T,H]`.
    """
    if position_ids is None:
        position_ids = positions_of(cu_seqlens, input_ids.shape[0])
    summed = (
        word.float()[input_ids.long()]
        + position.float()[position_ids.long()]
        + token_type.float()[token_type_ids.long()]
    )
    return layer_norm(summed, gamma, beta, eps)


def gelu(x: Tensor) -> Tensor:
    """`x * Phi(x)` with the exact erf, in fp32 (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return F.gelu(x.float())


def gelu_tanh(x: Tensor) -> Tensor:
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, in fp32."""
    return F.gelu(x.float(), approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": Tensor.float,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: torch.relu(x.float()),
    "silu": lambda x: F.silu(x.float()),
}


def activated(x: Tensor, activation: str) -> Tensor:
    """The activation of that name, none for an empty one, in fp32."""
    if activation not in ACTIVATIONS:
        known = ", ".join(name for name in ACTIVATIONS if name)
        raise ValueError(f"activation must be {known} or an empty name, is {activation!r}")
    return ACTIVATIONS[activation](x)


def bias_activation(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The activation of `input + bias`: `[T,N]`, `[N]` -> `[T,N]`."""
    x = input.float()
    return activated(x if bias is None else x + bias.float(), activation)


def product(input: Tensor, weight: Weight) -> Tensor:
    """`input @ weight.T` of a weight `[N,K]`, or of one layer that may be rounded."""
    if isinstance(weight, PreparedLayers):
        (only,) = weight.layers
        if not isinstance(only, Tensor):
            return only(input.float())
        weight = only
    return input.float() @ weight.float().reshape(-1, weight.shape[-1]).T


def linear(
    input: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "",
) -> Tensor:
    """`input @ weight.T + bias`, activated, then `+ residual`: `[T,K]`, `[N,K]` -> `[T,N]`."""
    out = product(input, weight)
    if bias is not None:
        out = out + bias.float()
    out = activated(out, activation)
    return out if residual is None else out + residual.float()


def bias_of_distances(relative_bias: Tensor, length: int) -> Tensor:
    """What is added to the scores of a sequence: `[heads, 2D+1]` -> fp32 `[heads, length, length]`.

    The distance of a key from its query, cut off at D (Shaw et al., arXiv 1803.02155), names the
    column.
    """
    most = relative_bias.shape[1] // 2
    places = torch.arange(length, device=relative_bias.device)
    distances = places[None, :] - places[:, None]
    return relative_bias.float()[:, distances.clamp(-most, most) + most]


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """`softmax(q k^T / sqrt(d) + bias) v` in each sequence: `[T,3H]` -> `[T,H]`, else zeros.

    `max_seqlen` only bounds the lengths, as it does in the ops (Dao, arXiv 2307.08691).
    """
    total, width = qkv.shape
    hidden = width // 3
    head_dim = hidden // num_heads
    out = torch.zeros(total, hidden, dtype=torch.float32, device=qkv.device)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        if end - start > max_seqlen:
            raise ValueError(
                f"cu_seqlens: a sequence of {end - start} tokens is over max_seqlen {max_seqlen}"
            )
        if start == end:
            continue
        q, k, v = (
            part.reshape(end - start, num_heads, head_dim).transpose(0, 1)
            for part in torch.split(qkv[start:end].float(), hidden, dim=1)
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(head_dim)
        if relative_bias is not None:
            scores = scores + bias_of_distances(relative_bias, end - start)
        probabilities = torch.softmax(scores, dim=-1)
        out[start:end] = (probabilities @ v).transpose(0, 1).reshape(end - start, hidden)
    return out


def segment_pool(input: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """The "mean" or "max" of each sequence's rows: `[T,H]` -> `[B,H]`, zeros for empty ones."""
    if how not in ("mean", "max"):
        raise ValueError(f"how must be mean or max, is {how!r}")
    out = torch.zeros(cu_seqlens.shape[0] - 1, input.shape[1], device=input.device)
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if end > start:
            rows = input[start:end].float()
            out[b] = rows.mean(0) if how == "mean" else rows.amax(0)
    return out


def residual_layer_norm(
    input: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """Layer norm of `input + bias + residual`: `[T,H]` -> `[T,H]`."""
    x = input.float() + residual.float()
    return layer_norm(x if bias is None else x + bias.float(), gamma, beta, eps)


def _said(spec: str, weights: Sequence[_W]) -> tuple[dict[str, str], dict[str, _W]]:
    """What an encoder's specification says, and its weights by name."""
    words = dict(word.split("=", 1) for word in spec.split())
    return words, dict(zip(words["weights"].split(","), weights, strict=True))


def _layer(named: Mapping[str, _W], index: int) -> dict[str, _W]:
    """One layer's parameters, by what follows `layers.`; those of one layer may serve all."""
    return {
        name.removeprefix("layers."): cast(_W, stack[index % len(stack)])
        for name, stack in named.items()
        if name.startswith("layers.")
    }


def _with_narrow(said: Mapping[str, str], named: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights with products of 8-bit floats in the place of those that they go beside.

    `floats=qkv:1,4;up:0` names the layers in which a product is a float one all the same.
    """
    floats = {
        product: [int(layer) for layer in layers.split(",")]
        for product, layers in (w.split(":") for w in said.get("floats", "").split(";") if w)
    }
    found = dict(named)
    for name in [n.removesuffix(".narrow") for n in named if n.endswith(".narrow")]:
        narrow, units, steps = (
            cast(Tensor, found.pop(f"{name}.{part}"))
            for part in ("narrow", "narrow_scale", "input_scale")
        )
        weight = cast(Tensor, named[f"{name}.weight"]).float()
        kept = floats.get(name.removeprefix("layers."), [])
        found[f"{name}.weight"] = PreparedLayers(
            tuple(
                weight[i]
                if i in kept
                else partial(narrow_product, weight=rows, scale=units[i], input_scale=steps[i])
                for i, rows in enumerate(_unprepared(narrow))
            )
        )
    return found


def encode(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Weight],
    spec: str,
    options: str = "",
) -> Tensor:
    """BERT's encoder (Devlin et al., arXiv 1810.04805) over packed tokens: ids `[T]` -> `[T,H]`.

    `spec` says the sizes and the order of `weights`, as `EncoderSpec.text` writes it. A stack of
    one layer's parameters serves every layer, and embeddings of another width than H are projected
    (Lan et al., arXiv 1909.11942). A relative bias serves every layer (Song et al., arXiv
    2004.09297). Products are plain weights or PreparedLayers. A product `layers.X` may be one of
    8-bit floats (see `narrow_product`), given beside its float weight: `layers.X.narrow`, what
    `prepare_narrow` made; `.narrow_scale [L,N]`, what sums are worth; and `.input_scale [L]`.
    `options` say how the ops run and change nothing here.
    """
    said, given = _said(spec, weights)
    all_named = _with_narrow(said, given)
    quantized = {n: w for n, w in all_named.items() if isinstance(w, PreparedLayers)}
    named = {n: w for n, w in all_named.items() if isinstance(w, Tensor)}
    eps = float(said["eps"])
    x = embedding_layer_norm(
        input_ids,
        token_type_ids,
        position_ids,
        cu_seqlens,
        named["embeddings.word"],
        named["embeddings.position"],
        named["embeddings.token_type"],
        named["embeddings.norm.weight"],
        named["embeddings.norm.bias"],
        eps,
    )
    if "embeddings.projection.weight" in all_named:
        projection = all_named["embeddings.projection.weight"]
        x = linear(x, projection, named["embeddings.projection.bias"], None)
    for i in range(int(said["layers"])):
        p = _layer(named, i)
        w: dict[str, Weight] = {**p, **_layer(quantized, i)}
        qkv = linear(x, w["qkv.weight"], p["qkv.bias"], None)
        context = varlen_attention(
            qkv, cu_seqlens, max_seqlen, int(said["heads"]), named.get("attention.relative_bias")
        )
        projected = linear(context, w["out.weight"], None, None)
        x = residual_layer_norm(
            projected, p["out.bias"], x, p["norm1.weight"], p["norm1.bias"], eps
        )
        inner = linear(x, w["up.weight"], p["up.bias"], None, said["activation"])
        outer = linear(inner, w["down.weight"], None, None)
        x = residual_layer_norm(outer, p["down.bias"], x, p["norm2.weight"], p["norm2.bias"], eps)
    return x


def padded_encode(
    input_ids: Tensor,
    token_type_ids: Tensor,
    attention_mask: Tensor,
    weights: Sequence[Tensor],
    spec: str,
) -> Tensor:
    """The same encoder the textbook way, pads and mask included: `[B,S]` -> `[B,S,H]`.

    Rows of masked tokens hold whatever the arithmetic gives; compare kept rows only.
    """
    said, named = _said(spec, weights)
    named = {name: tensor.float() for name, tensor in named.items()}
    eps, num_heads = float(said["eps"]), int(said["heads"])
    batch, seqlen = input_ids.shape
    hidden = int(said["hidden"])
    columns = torch.arange(seqlen, device=input_ids.device)
    x = layer_norm(
        named["embeddings.word"][input_ids.long()]
        + named["embeddings.position"][columns]
        + named["embeddings.token_type"][token_type_ids.long()],
        named["embeddings.norm.weight"],
        named["embeddings.norm.bias"],
        eps,
    )
    if "embeddings.projection.weight" in named:
        projection = named["embeddings.projection.weight"]
        x = F.linear(x, projection, named["embeddings.projection.bias"])
    hidden_keys = (attention_mask == 0)[:, None, None, :]
    for i in range(int(said["layers"])):
        p = _layer(named, i)
        qkv = F.linear(x, p["qkv.weight"], p["qkv.bias"])
        q, k, v = (
            part.reshape(batch, seqlen, num_heads, -1).transpose(1, 2)
            for part in torch.split(qkv, hidden, dim=2)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(hidden // num_heads)
        if "attention.relative_bias" in named:
            scores = scores + bias_of_distances(named["attention.relative_bias"], seqlen)
        scores = scores.masked_fill(hidden_keys, torch.finfo(torch.float32).min)
        context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, seqlen, hidden)
        projected = F.linear(context, p["out.weight"], p["out.bias"])
        x = layer_norm(projected + x, p["norm1.weight"], p["norm1.bias"], eps)
        inner = activated(F.linear(x, p["up.weight"], p["up.bias"]), said["activation"])
        outer = F.linear(inner, p["down.weight"], p["down.bias"])
        x = layer_norm(outer + x, p["norm2.weight"], p["norm2.bias"], eps)
    return x
