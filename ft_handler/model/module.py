"""The traced EFFT model: a padding-free encoder and a head, as one TorchScript module.

T tokens, B sequences, S padded length, C columns. Two entries: `forward` takes padded tensors, as
transformers' own model does, removes the padding first and restores it last; `packed` takes what
has none.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ft_handler.model.encoder import Encoder
from ft_handler.model.heads import HeadModule
from ft_handler.native.library import load_library


def check_padded(
    input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, max_positions: int
) -> None:
    """Refuse padded inputs that are not three `[B,S]` of one shape with S in reach."""
    if input_ids.dim() != 2:
        raise RuntimeError(f"input_ids must be [batch, length], not {input_ids.dim()}-dimensional")
    if attention_mask.shape != input_ids.shape:
        raise RuntimeError(
            f"attention_mask is {attention_mask.shape}, input_ids is {input_ids.shape}"
        )
    if token_type_ids.shape != input_ids.shape:
        raise RuntimeError(
            f"token_type_ids is {token_type_ids.shape}, input_ids is {input_ids.shape}"
        )
    if input_ids.shape[1] > max_positions:
        raise RuntimeError(
            f"input_ids: length {input_ids.shape[1]} is over the model's {max_positions} positions"
        )


def check_packed(
    input_ids: Tensor,
    token_type_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    max_positions: int,
) -> None:
    """Refuse packed inputs of the wrong rank or over the model's positions; reads no value."""
    if input_ids.dim() != 1 or token_type_ids.shape != input_ids.shape:
        raise RuntimeError(
            "input_ids and token_type_ids must be [tokens] of one length, not "
            f"{input_ids.shape} and {token_type_ids.shape}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise RuntimeError(f"cu_seqlens must be [batch + 1], not {cu_seqlens.shape}")
    if max_seqlen > max_positions:
        raise RuntimeError(f"max_seqlen {max_seqlen} is over the model's {max_positions} positions")


class FusedModel(nn.Module):
    """An encoder and a head (see `ft_handler.model.heads`).

    mode       the task's name
    per_token  whether the head's outputs are for each token, else for each sequence
    columns    outputs a token or a sequence
    """

    __constants__ = ("columns", "max_positions", "mode", "per_token")

    def __init__(
        self, encoder: Encoder, head: HeadModule, mode: str, per_token: bool, columns: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.mode = mode
        self.per_token = per_token
        self.columns = columns
        self.max_positions = encoder.max_positions

    def logits(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Packed ids `[T]` -> fp32 `[B,C]`, or `[C,T]` where outputs are for each token."""
        if input_ids.shape[0] == 0:
            if self.per_token:
                return torch.zeros([self.columns, 0], device=input_ids.device)
            if cu_seqlens.shape[0] > 1:
                raise RuntimeError("input_ids: no token to read")
            return torch.zeros([0, self.columns], device=input_ids.device)
        hidden = self.encoder(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
        out: Tensor = self.head(hidden, cu_seqlens)
        return out

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        """Padded `[B,S]` (int32 or int64), any B and S up to the positions -> the head's tuple."""
        check_padded(input_ids, attention_mask, token_type_ids, self.max_positions)
        ids, types, positions, indices, cu_seqlens, longest = (
            torch.ops.fastertransformer.remove_padding(
                input_ids, token_type_ids.to(input_ids.dtype), attention_mask.to(input_ids.dtype)
            )
        )
        logits = self.logits(ids, types, positions, cu_seqlens, longest)
        return self.head.padded(logits, indices, input_ids.shape[0], input_ids.shape[1])

    @torch.jit.export
    def packed(
        self, input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Packed ids `[T]`, `cu_seqlens [B+1]` int32, the longest length -> `[B,C]` or `[C,T]`."""
        check_packed(input_ids, token_type_ids, cu_seqlens, max_seqlen, self.max_positions)
        return self.logits(input_ids, token_type_ids, None, cu_seqlens, max_seqlen)

    @torch.jit.export
    def prepare(self) -> None:
        """Lay the GEMM weights out for the device the parameters live on."""
        self.encoder.prepare()

    @torch.jit.export
    def release(self) -> None:
        """Prepare, then drop the unpacked GEMM weights: half the memory, no more moves or saves."""
        self.encoder.release()

    @torch.jit.export
    def configure(self, options: str) -> None:
        """How to run, in the words of the op `encode`, such as "batch_invariant"."""
        self.encoder.configure(options)


def script(model: FusedModel) -> torch.jit.ScriptModule:
    """The model as a TorchScript module; needs the library."""
    load_library()
    compiled = cast("Callable[[nn.Module], torch.jit.ScriptModule]", torch.jit.script)
    return compiled(model.eval())
