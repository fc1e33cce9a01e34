"""The traced EFFT model: a padding-free encoder and a head, as one TorchScript file.

T tokens, B sequences, S padded length, H hidden, I intermediate, L layers. The file's metadata
travels inside it as the extra file `ft_handler.json`.
"""

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ft_handler._lib import check_device, load_library
from ft_handler.errors import ModelError
from ft_handler.version import __version__

FORMAT_VERSION = 1
METADATA_FILE = "ft_handler.json"
SEQUENCE_CLASSIFICATION = "sequence_classification"
QUESTION_ANSWERING = "question_answering"
MODES = (SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING)
DATA_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PAD_LOGIT = -10000.0


@dataclass(frozen=True)
class ModelInfo:
    """What a traced file says of itself; `remove_padding` is True for the fused model."""

    format_version: int
    mode: str
    architecture: str
    data_type: str
    model_type: str
    remove_padding: bool
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    vocab_size: int
    type_vocab_size: int
    num_labels: int
    labels: dict[int, str]
    problem_type: str | None
    do_lower_case: bool
    layer_norm_eps: float
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of the file's `ft_handler.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = METADATA_FILE) -> "ModelInfo":
        """Read metadata back; raises ModelError naming what is missing, unknown or mistyped."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{origin}: its metadata is not JSON") from error
        if not isinstance(raw, dict):
            raise ModelError(f"{origin}: its metadata is not a JSON object")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelError(
                f"{origin}: format version {version!r}; this package reads version "
                f"{FORMAT_VERSION}; trace the checkpoint again or install the matching ft-handler"
            )
        fields = {f.name for f in dataclasses.fields(cls)}
        if missing := sorted(fields - raw.keys()):
            raise ModelError(f"{origin}: its metadata lacks {', '.join(missing)}")
        if unknown := sorted(raw.keys() - fields):
            raise ModelError(f"{origin}: its metadata has unknown fields {', '.join(unknown)}")
        for name in _INTEGERS:
            if type(raw[name]) is not int or raw[name] < 0:
                raise ModelError(f"{origin}: {name} must be a whole number, not {raw[name]!r}")
        if raw["mode"] not in MODES:
            raise ModelError(f"{origin}: unknown mode {raw['mode']!r}")
        if raw["data_type"] not in DATA_TYPES:
            raise ModelError(f"{origin}: unknown data_type {raw['data_type']!r}")
        if raw["model_type"] not in ("ths", "thsext"):
            raise ModelError(f"{origin}: unknown model_type {raw['model_type']!r}")
        try:
            raw["labels"] = {int(k): str(v) for k, v in raw["labels"].items()}
        except (AttributeError, ValueError) as error:
            raise ModelError(f"{origin}: labels must map numbers to names") from error
        if sorted(raw["labels"]) != list(range(len(raw["labels"]))):
            raise ModelError(f"{origin}: labels must be numbered from 0 without gaps")
        return cls(**raw)


_INTEGERS = (
    "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions",
    "vocab_size", "type_vocab_size", "num_labels",
)  # fmt: skip


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


def save_model(
    module: torch.jit.ScriptModule, info: ModelInfo, path: str | os.PathLike[str]
) -> None:
    """Write the module and its metadata to `path`, which appears whole or not at all."""
    final = Path(path)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=final.parent) as scratch:
        # Of the same name, since the name becomes the folder inside the file.
        partial = Path(scratch) / final.name
        torch.jit.save(module, str(partial), _extra_files={METADATA_FILE: info.to_json()})
        os.replace(partial, final)


def read_info(path: str | os.PathLike[str]) -> ModelInfo:
    """Read a traced file's metadata without loading it; raises ModelError in words."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; `ft-handler trace` makes one")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(
                (n for n in archive.namelist() if n.endswith("/extra/" + METADATA_FILE)), None
            )
            if name is None:
                raise ModelError(
                    f"{path}: carries no {METADATA_FILE}; it was not made by `ft-handler trace`"
                )
            return ModelInfo.from_json(archive.read(name), str(path))
    except zipfile.BadZipFile as error:
        raise ModelError(f"{path}: not a TorchScript file, or cut short") from error


@dataclass(frozen=True)
class LoadedModel:
    """A traced file in memory: the TorchScript module and what the file says of itself."""

    module: Any
    info: ModelInfo

    @property
    def packed(self) -> bool:
        """Whether the module has the packed entry (a plain `ths` file has not)."""
        return self.info.model_type == "thsext"


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    library: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a traced file onto `device`; `library` is where to look for the ops first.

    Raises ModelError when the file is not ours, of another format, or contradicts its own
    metadata, and LibraryError when the library is missing or does not serve the device.
    """
    info = read_info(path)
    target = torch.device(device)
    if info.model_type == "thsext":
        load_library(library)
    if target.type == "cuda":
        check_device(target)
    try:
        module: Any = torch.jit.load(str(path), map_location=target)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path}: does not load on torch {torch.__version__} (written by torch "
            f"{info.versions.get('torch', 'unknown')}): {first}"
        ) from error
    module.eval()
    if info.model_type == "thsext":
        _check_weights(module, info, str(path))
    return LoadedModel(module, info)


def _check_weights(module: Any, info: ModelInfo, origin: str) -> None:
    """Compare the weights' shapes and dtype with the metadata."""
    encoder = module.encoder
    found: dict[str, object] = {
        "data_type": encoder.word.dtype,
        "vocab_size": encoder.word.shape[0],
        "hidden_size": encoder.word.shape[1],
        "max_positions": encoder.position.shape[0],
        "type_vocab_size": encoder.token_type.shape[0],
        "num_layers": encoder.qkv_bias.shape[0],
        "intermediate_size": encoder.up_bias.shape[1],
        "num_heads": encoder.num_heads,
        "mode": QUESTION_ANSWERING if hasattr(module, "qa_weight") else SEQUENCE_CLASSIFICATION,
    }
    if info.mode == SEQUENCE_CLASSIFICATION and hasattr(module, "classifier_weight"):
        found["num_labels"] = module.classifier_weight.shape[0]
    for name, value in found.items():
        said = DATA_TYPES[info.data_type] if name == "data_type" else getattr(info, name)
        if said != value:
            raise ModelError(f"{origin}: metadata says {name} {said}, the weights say {value}")
    if info.mode == SEQUENCE_CLASSIFICATION and len(info.labels) != info.num_labels:
        raise ModelError(
            f"{origin}: metadata names {len(info.labels)} labels for {info.num_labels} outputs"
        )


def versions() -> dict[str, str]:
    """The versions a file records of what made it."""
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ft_handler": __version__,
    }
