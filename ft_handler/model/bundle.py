"""Saving and loading traced files."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from ft_handler import precisions
from ft_handler.errors import ModelError
from ft_handler.files import METADATA_FILE, TOKENIZER_FILE
from ft_handler.model.info import ModelInfo
from ft_handler.native.library import check_device, load_library


class TracedModule(Protocol):
    """What every traced file can be asked: padded tensors in."""

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, /
    ) -> tuple[Tensor, ...]:
        """Padded `[B,S]` -> fp32 logits, the task's outputs one by one."""


class FusedModule(TracedModule, Protocol):
    """What a traced file of the fused model can be asked besides."""

    def packed(
        self, input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, /
    ) -> Tensor:
        """Packed ids `[T]`, `cu_seqlens [B+1]` int32, the longest length -> fp32 logits."""

    def release(self) -> None:
        """Lay the weights out for their device, then drop them as stored: no more moves."""

    def configure(self, options: str, /) -> None:
        """How to run, in the words of the op `encode`."""


class FirstFormat:
    """A module of format 1 behind the calls of today's."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self._module = module

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, /
    ) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self._module(input_ids, attention_mask, token_type_ids)
        return out

    def packed(
        self, input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, /
    ) -> Tensor:
        columns = self._module.packed(input_ids, token_type_ids, cu_seqlens, max_seqlen)
        return columns[0] if len(columns) == 1 else torch.stack(columns)

    def release(self) -> None:
        self._module.release_raw()

    def configure(self, options: str, /) -> None:
        if options:
            raise ModelError(
                f"a traced file of format 1 cannot run with {options!r}: trace the checkpoint again"
            )


@dataclass(frozen=True)
class LoadedModel:
    """A traced file in memory: its module and what the file says of itself."""

    module: TracedModule
    info: ModelInfo

    @property
    def fused(self) -> FusedModule:
        """The module with its packed entry; raises ModelError for a file that has none."""
        if self.info.model_type != "thsext":
            raise ModelError(
                f"the traced file is of model_type '{self.info.model_type}', which pads and is "
                "there for comparison: trace with --model_type thsext"
            )
        return cast(FusedModule, self.module)


# -- files ---------------------------------------------------------------------------------------


def save_model(
    module: torch.jit.ScriptModule,
    info: ModelInfo,
    path: str | os.PathLike[str],
    tokenizer: str | None = None,
) -> None:
    """Write the module and its metadata to `path`, which appears whole or not at all.

    tokenizer  the text of a `tokenizer.json`, which the file then carries
    """
    final = Path(path)
    extra = {METADATA_FILE: info.to_json()}
    if tokenizer is not None:
        extra[TOKENIZER_FILE] = tokenizer
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=final.parent) as scratch:
        # Of the same name, since the name becomes the folder inside the file.
        partial = Path(scratch) / final.name
        torch.jit.save(module, str(partial), _extra_files=extra)
        os.replace(partial, final)


def read_info(path: str | os.PathLike[str]) -> ModelInfo:
    """Read a traced file's metadata without loading it; raises ModelError in words."""
    text = _carried(Path(path), METADATA_FILE)
    if text is None:
        raise ModelError(
            f"{path}: carries no {METADATA_FILE}; it was not made by `ft-handler trace`"
        )
    return ModelInfo.from_json(text, str(path))


def read_tokenizer(path: str | os.PathLike[str]) -> str | None:
    """The text of the `tokenizer.json` that a traced file carries, without loading the file.

    None when it carries none, as files of format 1. Raises ModelError in words.
    """
    text = _carried(Path(path), TOKENIZER_FILE)
    return None if text is None else text.decode()


def _carried(path: Path, name: str) -> bytes | None:
    """The content of an extra file inside a traced file, or None."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; `ft-handler trace` makes one")
    try:
        with zipfile.ZipFile(path) as archive:
            found = (n for n in archive.namelist() if n.endswith("/extra/" + name))
            member = next(found, None)
            return None if member is None else archive.read(member)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{path}: not a TorchScript file, or cut short") from error


_load = cast("Callable[..., torch.jit.ScriptModule]", torch.jit.load)


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
    if target.type not in precisions.get(info.data_type).devices:
        raise ModelError(f"{path}: is in {info.data_type}, which no {target.type} device serves")
    if target.type == "cuda" and info.quantized is not None and not info.quantized.half:
        raise ModelError(
            f"{path}: a GPU computes {info.data_type} in fp16, in which this model overflows; "
            "serve it on a CPU, or trace it in bf16"
        )
    fused = info.model_type == "thsext"
    if fused:
        load_library(library, interface=info.op_interface, cuda=target.type == "cuda")
    if target.type == "cuda":
        check_device(target)
    try:
        module = _load(str(path), map_location=target)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path}: does not load on torch {torch.__version__} (written by torch "
            f"{info.versions.get('torch', 'unknown')}): {first}"
        ) from error
    module.eval()
    if fused:
        told = _told_by_format_1 if info.format_version == 1 else _told
        try:
            fields = told(module, info)
        except (KeyError, AttributeError):
            raise ModelError(
                f"{path}: metadata says format_version {info.format_version}, its module has "
                "another form"
            ) from None
        for field, found in fields.items():
            said = getattr(info, field)
            if said != found:
                raise ModelError(f"{path}: metadata says {field} {said}, the weights say {found}")
    if info.labels and len(info.labels) != info.num_labels:
        raise ModelError(
            f"{path}: metadata names {len(info.labels)} labels for {info.num_labels} outputs"
        )
    if fused and info.format_version == 1:
        return LoadedModel(FirstFormat(module), info)
    return LoadedModel(cast(TracedModule, module), info)


#: Field -> the tensor of a module and the dimension that tell it.
_SIZES = {
    "vocab_size": ("encoder.embeddings.word", 0),
    "max_positions": ("encoder.embeddings.position", 0),
    "type_vocab_size": ("encoder.embeddings.token_type", 0),
    "hidden_size": ("encoder.layers.qkv.weight", 2),
    "intermediate_size": ("encoder.layers.up.weight", 1),
}
_SIZES_1 = {
    "vocab_size": ("encoder.word", 0),
    "hidden_size": ("encoder.word", 1),
    "max_positions": ("encoder.position", 0),
    "type_vocab_size": ("encoder.token_type", 0),
    "num_layers": ("encoder.qkv_bias", 0),
    "intermediate_size": ("encoder.up_bias", 1),
}
#: The two heads that format 1 had: mode -> the weight with a row an output.
_HEADS_1 = {
    "sequence_classification": "classifier_weight",
    "question_answering": "qa_weight",
}


def _data_type(stored: torch.dtype, product: torch.dtype, info: ModelInfo) -> str:
    """What a module's word table and its products say."""
    expected = precisions.get(info.data_type)
    if stored == expected.dtype and product == expected.product_dtype:
        return info.data_type
    return str(stored if stored != expected.dtype else product).removeprefix("torch.")


def _told(module: torch.jit.ScriptModule, info: ModelInfo) -> dict[str, object]:
    """What a module says of the metadata's fields."""
    tensors = dict(module.named_buffers())
    spec = dict(word.split("=", 1) for word in module.encoder.spec.split())
    sizes = {field: tensors[name].shape[axis] for field, (name, axis) in _SIZES.items()}
    return {
        "mode": module.mode,
        **sizes,
        "num_layers": int(spec["layers"]),
        "num_heads": int(spec["heads"]),
        "num_labels": module.columns,
        "data_type": _data_type(
            tensors["encoder.embeddings.word"].dtype,
            tensors["encoder.layers.qkv.weight"].dtype,
            info,
        ),
    }


def _told_by_format_1(module: torch.jit.ScriptModule, info: ModelInfo) -> dict[str, object]:
    """The same of a module of format 1, which names neither its task nor its columns."""
    tensors = dict(module.named_buffers())
    mode = next((mode for mode, weight in _HEADS_1.items() if weight in tensors), "unknown")
    if mode != info.mode:
        return {"mode": mode}
    sizes = {field: tensors[name].shape[axis] for field, (name, axis) in _SIZES_1.items()}
    return {
        **sizes,
        "num_heads": module.encoder.num_heads,
        "num_labels": tensors[_HEADS_1[mode]].shape[0],
        "data_type": _data_type(tensors["encoder.word"].dtype, tensors["encoder.word"].dtype, info),
    }
