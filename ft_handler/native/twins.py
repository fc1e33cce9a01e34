"""Eager fp32 twins of the ops, in plain torch: what every kernel is held against.

Names, arguments and shapes are those of the ops. Inputs of any float type are raised to fp32
first and results are fp32, so the twin of a half-precision op is its exact answer up to fp32
rounding. T tokens, B sequences, H hidden, I intermediate, L layers.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def prepare_weight(weight: Tensor) -> Tensor:
    """The twin's GEMM wants no other layout: `[L,N,K]` or `[N,K]` in fp32."""
    return weight.float()


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


def bias_gelu(input: Tensor, bias: Tensor | None) -> Tensor:
    """GELU of `input + bias`: `[T,N]`, `[N]` -> `[T,N]`."""
    x = input.float()
    return gelu(x if bias is None else x + bias.float())


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool
) -> Tensor:
    """`input @ weight.T + bias`, GELU if asked, then `+ residual`: `[T,K]`, `[N,K]` -> `[T,N]`."""
    out = input.float() @ weight.float().reshape(-1, weight.shape[-1]).T
    if bias is not None:
        out = out + bias.float()
    if gelu:
        out = F.gelu(out)
    return out if residual is None else out + residual.float()


def varlen_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, num_heads: int) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` within each sequence: `[T,3H]` -> `[T,H]`; other rows are zero.

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
        probabilities = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(head_dim), dim=-1)
        out[start:end] = (probabilities @ v).transpose(0, 1).reshape(end - start, hidden)
    return out


def residual_layer_norm(
    input: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """Layer norm of `input + bias + residual`: `[T,H]` -> `[T,H]`."""
    x = input.float() + residual.float()
    return layer_norm(x if bias is None else x + bias.float(), gamma, beta, eps)


def encoder(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    emb_gamma: Tensor,
    emb_beta: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ln1_gamma: Tensor,
    ln1_beta: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    ln2_gamma: Tensor,
    ln2_beta: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """BERT's encoder (Devlin et al., arXiv 1810.04805) over packed tokens: ids `[T]` -> `[T,H]`.

    Weights are stacked over layers: `[L,3H,H] [L,H,H] [L,I,H] [L,H,I]`; biases `[L,N]`; norms
    `[L,H]`.
    """
    x = embedding_layer_norm(
        input_ids,
        token_type_ids,
        position_ids,
        cu_seqlens,
        word,
        position,
        token_type,
        emb_gamma,
        emb_beta,
        eps,
    )
    for i in range(qkv_weight.shape[0]):
        qkv = linear(x, qkv_weight[i], qkv_bias[i], None, False)
        context = varlen_attention(qkv, cu_seqlens, max_seqlen, num_heads)
        projected = linear(context, out_weight[i], None, None, False)
        x = residual_layer_norm(projected, out_bias[i], x, ln1_gamma[i], ln1_beta[i], eps)
        inner = linear(x, up_weight[i], up_bias[i], None, True)
        outer = linear(inner, down_weight[i], None, None, False)
        x = residual_layer_norm(outer, down_bias[i], x, ln2_gamma[i], ln2_beta[i], eps)
    return x


def padded_encoder(
    input_ids: Tensor,
    token_type_ids: Tensor,
    attention_mask: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    emb_gamma: Tensor,
    emb_beta: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ln1_gamma: Tensor,
    ln1_beta: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    ln2_gamma: Tensor,
    ln2_beta: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """The same encoder the textbook way, pads and mask included: `[B,S]` -> `[B,S,H]`.

    Rows of masked tokens hold whatever the arithmetic gives; compare kept rows only.
    """
    batch, seqlen = input_ids.shape
    hidden = word.shape[1]
    columns = torch.arange(seqlen, device=input_ids.device)
    x = layer_norm(
        word.float()[input_ids.long()]
        + position.float()[columns]
        + token_type.float()[token_type_ids.long()],
        emb_gamma,
        emb_beta,
        eps,
    )
    hidden_keys = (attention_mask == 0)[:, None, None, :]
    for i in range(qkv_weight.shape[0]):
        qkv = F.linear(x, qkv_weight[i].float(), qkv_bias[i].float())
        q, k, v = (
            part.reshape(batch, seqlen, num_heads, -1).transpose(1, 2)
            for part in torch.split(qkv, hidden, dim=2)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(hidden // num_heads)
        scores = scores.masked_fill(hidden_keys, torch.finfo(torch.float32).min)
        context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, seqlen, hidden)
        projected = F.linear(context, out_weight[i].float(), out_bias[i].float())
        x = layer_norm(projected + x, ln1_gamma[i], ln1_beta[i], eps)
        inner = gelu(F.linear(x, up_weight[i].float(), up_bias[i].float()))
        outer = F.linear(inner, down_weight[i].float(), down_bias[i].float())
        x = layer_norm(outer + x, ln2_gamma[i], ln2_beta[i], eps)
    return x
