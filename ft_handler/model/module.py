"""The traced EFFT model: a padding-free encoder and a head, as one TorchScript file.

T tokens, B sequences, S padded length, H hidden, I intermediate, L layers. The file's metadata
travels inside it as the extra file `ft_handler.json`.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ft_handler.model.info import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION
from ft_handler.native.library import load_library

PAD_LOGIT = -10000.0


class GemmWeights(nn.Module):
    """The four stacked GEMM weights, as stored and as the running device wants them.

    Prepared weights depend on the processor and are never serialised.
    """

    # Annotations are read by TorchScript too, which cannot resolve strings: no __future__ import.
    raw_qkv: Tensor
    raw_out: Tensor
    raw_up: Tensor
    raw_down: Tensor

    def __init__(self, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.register_buffer("raw_qkv", qkv)
        self.register_buffer("raw_out", out)
        self.register_buffer("raw_up", up)
        self.register_buffer("raw_down", down)
        self.qkv = torch.empty(0)
        self.out = torch.empty(0)
        self.up = torch.empty(0)
        self.down = torch.empty(0)
        self.prepared_like = torch.empty(0)
        self.ready = False
        self.released = False

    @torch.jit.export
    def prepare(self) -> None:
        """Lay the weights out for the device they are on, unless that is done."""
        if (
            self.ready
            and self.prepared_like.device == self.raw_qkv.device
            and self.prepared_like.dtype == self.raw_qkv.dtype
        ):
            return
        if self.released:
            raise RuntimeError(
                "the unpacked weights were released after prepare(): the model cannot move to "
                "another device or dtype; load the file again there"
            )
        self.qkv = torch.ops.fastertransformer.prepare_weight(self.raw_qkv)
        self.out = torch.ops.fastertransformer.prepare_weight(self.raw_out)
        self.up = torch.ops.fastertransformer.prepare_weight(self.raw_up)
        self.down = torch.ops.fastertransformer.prepare_weight(self.raw_down)
        self.prepared_like = torch.empty(0, dtype=self.raw_qkv.dtype, device=self.raw_qkv.device)
        self.ready = True

    @torch.jit.export
    def release(self) -> None:
        """Drop the unpacked weights; the model can then neither move nor be saved."""
        empty = torch.empty(0, dtype=self.raw_qkv.dtype, device=self.raw_qkv.device)
        self.raw_qkv = empty
        self.raw_out = empty
        self.raw_up = empty
        self.raw_down = empty
        self.released = True

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
        if self.released:
            raise RuntimeError(
                "the unpacked weights were released after prepare(): the model cannot be saved"
            )
        return (self.raw_qkv, self.raw_out, self.raw_up, self.raw_down, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Tensor, Tensor, Tensor, bool]) -> None:
        self.raw_qkv = state[0]
        self.raw_out = state[1]
        self.raw_up = state[2]
        self.raw_down = state[3]
        self.training = state[4]
        self.qkv = torch.empty(0)
        self.out = torch.empty(0)
        self.up = torch.empty(0)
        self.down = torch.empty(0)
        self.prepared_like = torch.empty(0)
        self.ready = False
        self.released = False


class Encoder(nn.Module):
    """BERT's encoder over packed tokens, on the fused op; parameters in the file's dtype."""

    __constants__ = ("eps", "max_positions", "num_heads")

    word: Tensor
    position: Tensor
    token_type: Tensor
    emb_gamma: Tensor
    emb_beta: Tensor
    qkv_bias: Tensor
    out_bias: Tensor
    ln1_gamma: Tensor
    ln1_beta: Tensor
    up_bias: Tensor
    down_bias: Tensor
    ln2_gamma: Tensor
    ln2_beta: Tensor

    def __init__(self, weights: Mapping[str, Tensor], num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.max_positions = int(weights["position"].shape[0])
        self.gemm = GemmWeights(
            weights["qkv_weight"],
            weights["out_weight"],
            weights["up_weight"],
            weights["down_weight"],
        )
        for name in ENCODER_VECTORS:
            self.register_buffer(name, weights[name])

    @torch.jit.export
    def prepare(self) -> None:
        """Prepare the GEMM weights for the device the parameters live on, if not done yet."""
        self.gemm.prepare()

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
        hidden: Tensor = torch.ops.fastertransformer.encoder(
            input_ids,
            token_type_ids,
            position_ids,
            cu_seqlens,
            max_seqlen,
            self.word,
            self.position,
            self.token_type,
            self.emb_gamma,
            self.emb_beta,
            self.gemm.qkv,
            self.qkv_bias,
            self.gemm.out,
            self.out_bias,
            self.ln1_gamma,
            self.ln1_beta,
            self.gemm.up,
            self.up_bias,
            self.gemm.down,
            self.down_bias,
            self.ln2_gamma,
            self.ln2_beta,
            self.num_heads,
            self.eps,
        )
        return hidden


ENCODER_VECTORS = (
    "word", "position", "token_type", "emb_gamma", "emb_beta", "qkv_bias", "out_bias",
    "ln1_gamma", "ln1_beta", "up_bias", "down_bias", "ln2_gamma", "ln2_beta",
)  # fmt: skip
GEMM_WEIGHTS = ("qkv_weight", "out_weight", "up_weight", "down_weight")


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
    """What both heads share: the encoder and the care of its weights."""

    encoder: Encoder

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.max_positions = encoder.max_positions

    @torch.jit.export
    def prepare(self) -> None:
        """Lay the GEMM weights out for the device the parameters live on."""
        self.encoder.prepare()

    @torch.jit.export
    def release_raw(self) -> None:
        """Prepare, then drop the unpacked GEMM weights: half the memory, no more moves or saves."""
        self.encoder.prepare()
        self.encoder.gemm.release()


class SequenceClassifier(FusedModel):
    """Encoder, pooler and classifier; the head is kept and computed in fp32."""

    __constants__ = ("max_positions", "num_labels")
    pooler_weight: Tensor
    pooler_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(self, encoder: Encoder, head: Mapping[str, Tensor]) -> None:
        super().__init__(encoder)
        self.num_labels = int(head["classifier_weight"].shape[0])
        self.register_buffer("pooler_weight", head["pooler_weight"])
        self.register_buffer("pooler_bias", head["pooler_bias"])
        self.register_buffer("classifier_weight", head["classifier_weight"])
        self.register_buffer("classifier_bias", head["classifier_bias"])

    def classify(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Packed ids `[T]` -> logits `[B, num_labels]`, fp32."""
        batch = cu_seqlens.shape[0] - 1
        total = input_ids.shape[0]
        if total == 0:
            if batch > 0:
                raise RuntimeError("input_ids: no token to classify")
            return torch.zeros([0, self.num_labels], device=self.classifier_weight.device)
        hidden = self.encoder(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
        # The empty sequences that fill up a CUDA graph's batch may start behind the last token.
        firsts = cu_seqlens[:-1].clamp(max=total - 1)
        first = hidden.index_select(0, firsts).float()
        pooled = torch.tanh(nn.functional.linear(first, self.pooler_weight, self.pooler_bias))
        return nn.functional.linear(pooled, self.classifier_weight, self.classifier_bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor]:
        """Padded `[B,S]` (int32 or int64), any B and S up to the positions -> `[B, num_labels]`."""
        check_padded(input_ids, attention_mask, token_type_ids, self.max_positions)
        ids, types, positions, _, cu_seqlens, longest = torch.ops.fastertransformer.remove_padding(
            input_ids, token_type_ids.to(input_ids.dtype), attention_mask.to(input_ids.dtype)
        )
        return (self.classify(ids, types, positions, cu_seqlens, longest),)

    @torch.jit.export
    def packed(
        self, input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor]:
        """Packed ids `[T]`, `cu_seqlens [B+1]` int32, the longest length -> `[B, num_labels]`."""
        check_packed(input_ids, token_type_ids, cu_seqlens, max_seqlen, self.max_positions)
        return (self.classify(input_ids, token_type_ids, None, cu_seqlens, max_seqlen),)


class QuestionAnswerer(FusedModel):
    """Encoder and span head; the head is kept and computed in fp32."""

    __constants__ = ("max_positions", "pad_logit")
    qa_weight: Tensor
    qa_bias: Tensor

    def __init__(self, encoder: Encoder, head: Mapping[str, Tensor]) -> None:
        super().__init__(encoder)
        self.pad_logit = PAD_LOGIT
        self.register_buffer("qa_weight", head["qa_weight"])
        self.register_buffer("qa_bias", head["qa_bias"])

    def spans(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Packed ids `[T]` -> start and end logits `[2,T]`, fp32."""
        if input_ids.shape[0] == 0:
            return torch.zeros([2, 0], device=self.qa_weight.device)
        hidden = self.encoder(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen)
        # This way round both rows come out contiguous, and nobody has to copy them.
        return torch.addmm(self.qa_bias[:, None], self.qa_weight, hidden.float().t())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Padded `[B,S]` (int32 or int64) -> start and end logits `[B,S]`; pads are -10000."""
        check_padded(input_ids, attention_mask, token_type_ids, self.max_positions)
        ids, types, positions, indices, cu_seqlens, longest = (
            torch.ops.fastertransformer.remove_padding(
                input_ids, token_type_ids.to(input_ids.dtype), attention_mask.to(input_ids.dtype)
            )
        )
        logits = self.spans(ids, types, positions, cu_seqlens, longest)
        batch, width = input_ids.shape[0], input_ids.shape[1]
        restore = torch.ops.fastertransformer.restore_padding
        return (
            restore(logits[0], indices, batch, width, self.pad_logit),
            restore(logits[1], indices, batch, width, self.pad_logit),
        )

    @torch.jit.export
    def packed(
        self, input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, Tensor]:
        """Packed ids `[T]`, `cu_seqlens [B+1]` int32 -> start and end logits `[T]`."""
        check_packed(input_ids, token_type_ids, cu_seqlens, max_seqlen, self.max_positions)
        logits = self.spans(input_ids, token_type_ids, None, cu_seqlens, max_seqlen)
        return logits[0], logits[1]


HEADS = {
    SEQUENCE_CLASSIFICATION: (
        "pooler_weight",
        "pooler_bias",
        "classifier_weight",
        "classifier_bias",
    ),
    QUESTION_ANSWERING: ("qa_weight", "qa_bias"),
}


def build_module(
    mode: str,
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    layer_norm_eps: float,
    dtype: torch.dtype,
) -> torch.jit.ScriptModule:
    """Script the fused model from stacked weights (names of ENCODER_VECTORS, GEMM_WEIGHTS, HEADS).

    The encoder is stored in `dtype`, the head in fp32. Needs the library.
    """
    load_library()
    encoder = Encoder(
        {
            name: weights[name].detach().to(dtype).contiguous()
            for name in (*ENCODER_VECTORS, *GEMM_WEIGHTS)
        },
        num_heads,
        layer_norm_eps,
    )
    head = {name: weights[name].detach().float().contiguous() for name in HEADS[mode]}
    kind = SequenceClassifier if mode == SEQUENCE_CLASSIFICATION else QuestionAnswerer
    return cast(torch.jit.ScriptModule, torch.jit.script(kind(encoder, head).eval()))
