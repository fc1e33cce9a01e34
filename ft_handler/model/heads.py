"""Heads: from hidden states to logits, kept and computed in fp32.

T tokens, B sequences, S padded length, H hidden, C columns. A head is built with its weights as
keyword arguments and has two methods for TorchScript. `forward(hidden [T,H], cu_seqlens [B+1])`
gives `[B,C]`, or `[C,T]` where outputs are for each token. `padded(logits, token_indices, batch,
seqlen)` gives what callers of the padded entry get of these: a tuple, as transformers has it.
"""

from typing import Any

import torch
from torch import Tensor, nn

PAD_LOGIT = -10000.0


def laid_out(prepared: Tensor, weight: Tensor) -> Tensor:
    """A head's weight `[N,K]` as `product` takes it: `prepared`, where that is it already."""
    if weight.is_cuda or torch.ops.fastertransformer.is_prepared(prepared, weight):
        return prepared
    made: Tensor = torch.ops.fastertransformer.prepare_weight(weight)
    return made


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, prepared: Tensor) -> Tensor:
    """fp32 `[n,K]` under a linear layer `[N,K]`, `[N]` -> `[n,N]`.

    prepared  the weight `laid_out`
    """
    if rows.is_cuda:
        return nn.functional.linear(rows, weight, bias)
    # On a CPU torch adds in an order that depends on how many rows there are.
    out: Tensor = torch.ops.fastertransformer.linear(rows, prepared, bias, None, "")
    return out


class HeadModule(nn.Module):
    """What a head has to have."""

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits of packed tokens."""
        raise NotImplementedError

    def padded(self, logits: Tensor, token_indices: Tensor, batch: int, seqlen: int) -> Any:
        """The same as a tuple for callers with padded tensors."""
        raise NotImplementedError


class PooledHead(HeadModule):
    """A linear layer over the first token's summary, `tanh(dense(first token))` as BERT has it."""

    pooler_weight: Tensor
    pooler_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(
        self,
        pooler_weight: Tensor,
        pooler_bias: Tensor,
        classifier_weight: Tensor,
        classifier_bias: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("pooler_weight", pooler_weight)
        self.register_buffer("pooler_bias", pooler_bias)
        self.register_buffer("classifier_weight", classifier_weight)
        self.register_buffer("classifier_bias", classifier_bias)
        self.pooler_prepared = torch.empty(0)
        self.classifier_prepared = torch.empty(0)

    def curve(self, summary: Tensor) -> Tensor:
        """What the summary passes through."""
        return torch.tanh(summary)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states `[T,H]` -> logits `[B,C]`."""
        # The empty sequences that fill up a CUDA graph's batch may start behind the last token.
        firsts = cu_seqlens[:-1].clamp(max=hidden.shape[0] - 1)
        first = hidden.index_select(0, firsts).float()
        self.pooler_prepared = laid_out(self.pooler_prepared, self.pooler_weight)
        self.classifier_prepared = laid_out(self.classifier_prepared, self.classifier_weight)
        summary = product(first, self.pooler_weight, self.pooler_bias, self.pooler_prepared)
        return product(
            self.curve(summary),
            self.classifier_weight,
            self.classifier_bias,
            self.classifier_prepared,
        )

    @torch.jit.export
    def padded(
        self, logits: Tensor, token_indices: Tensor, batch: int, seqlen: int
    ) -> tuple[Tensor]:
        """The logits `[B,C]`."""
        return (logits,)


class ReluPooledHead(PooledHead):
    """The same with ReLU."""

    def curve(self, summary: Tensor) -> Tensor:
        """ReLU."""
        return torch.relu(summary)


class GeluPooledHead(PooledHead):
    """The same with GELU (erf)."""

    def curve(self, summary: Tensor) -> Tensor:
        """GELU."""
        return nn.functional.gelu(summary)


def token_logits(hidden: Tensor, weight: Tensor, bias: Tensor, prepared: Tensor) -> Tensor:
    """Hidden states `[T,H]` under a linear layer `[C,H]`, `[C]` -> fp32 `[C,T]`.

    prepared  the weight `laid_out`
    """
    if hidden.is_cuda:
        # This way round every row comes out contiguous, and nobody has to copy it.
        return torch.addmm(bias[:, None], weight, hidden.float().t())
    return product(hidden.float(), weight, bias, prepared).t().contiguous()


class TokenHead(HeadModule):
    """A linear layer over every token."""

    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(self, classifier_weight: Tensor, classifier_bias: Tensor) -> None:
        super().__init__()
        self.pad_logit = PAD_LOGIT
        self.register_buffer("classifier_weight", classifier_weight)
        self.register_buffer("classifier_bias", classifier_bias)
        self.prepared = torch.empty(0)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states `[T,H]` -> logits `[C,T]`."""
        self.prepared = laid_out(self.prepared, self.classifier_weight)
        return token_logits(hidden, self.classifier_weight, self.classifier_bias, self.prepared)

    @torch.jit.export
    def padded(
        self, logits: Tensor, token_indices: Tensor, batch: int, seqlen: int
    ) -> tuple[Tensor]:
        """The logits `[B,S,C]`; pads are -10000."""
        restore = torch.ops.fastertransformer.restore_padding
        rows = logits.t().contiguous()
        return (restore(rows, token_indices, batch, seqlen, self.pad_logit),)


class SpanHead(HeadModule):
    """Start and end logits of every token."""

    qa_weight: Tensor
    qa_bias: Tensor

    def __init__(self, qa_weight: Tensor, qa_bias: Tensor) -> None:
        super().__init__()
        self.pad_logit = PAD_LOGIT
        self.register_buffer("qa_weight", qa_weight)
        self.register_buffer("qa_bias", qa_bias)
        self.prepared = torch.empty(0)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states `[T,H]` -> start and end logits `[2,T]`."""
        self.prepared = laid_out(self.prepared, self.qa_weight)
        return token_logits(hidden, self.qa_weight, self.qa_bias, self.prepared)

    @torch.jit.export
    def padded(
        self, logits: Tensor, token_indices: Tensor, batch: int, seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Start and end logits, `[B,S]` each; pads are -10000."""
        restore = torch.ops.fastertransformer.restore_padding
        return (
            restore(logits[0], token_indices, batch, seqlen, self.pad_logit),
            restore(logits[1], token_indices, batch, seqlen, self.pad_logit),
        )


class VectorHead(HeadModule):
    """One vector a sequence: its hidden states pooled, then perhaps a linear layer and a tanh.

    pooling  "cls", the first token's; "last", the last token's; "mean" or "max" of all tokens
    curved   whether the tanh is there
    """

    __constants__ = ("curved", "pooling")
    dense_weight: Tensor | None
    dense_bias: Tensor | None

    def __init__(
        self,
        dense_weight: Tensor | None = None,
        dense_bias: Tensor | None = None,
        *,
        pooling: str,
        curved: bool = False,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.curved = curved
        self.register_buffer("dense_weight", dense_weight)
        self.register_buffer("dense_bias", dense_bias)
        self.prepared = torch.empty(0)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states `[T,H]` -> vectors `[B,H]`, or as many columns as the linear layer has."""
        # The empty sequences that fill up a CUDA graph's batch may lie outside of the tokens.
        if self.pooling == "cls":
            firsts = cu_seqlens[:-1].clamp(max=hidden.shape[0] - 1)
            pooled = hidden.index_select(0, firsts).float()
        elif self.pooling == "last":
            lasts = (cu_seqlens[1:] - 1).clamp(min=0, max=hidden.shape[0] - 1)
            pooled = hidden.index_select(0, lasts).float()
        else:
            pooled = torch.ops.fastertransformer.segment_pool(hidden, cu_seqlens, self.pooling)
        weight = self.dense_weight
        if weight is not None:
            self.prepared = laid_out(self.prepared, weight)
            pooled = product(pooled, weight, self.dense_bias, self.prepared)
            if self.curved:
                pooled = torch.tanh(pooled)
        return pooled

    @torch.jit.export
    def padded(
        self, logits: Tensor, token_indices: Tensor, batch: int, seqlen: int
    ) -> tuple[Tensor]:
        """The vectors."""
        return (logits,)
