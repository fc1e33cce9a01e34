"""Saving and loading traced files."""

import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ft_handler.errors import ModelError
from ft_handler.model.info import (
    DATA_TYPES,
    METADATA_FILE,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    ModelInfo,
)
from ft_handler.native.library import check_device, load_library
from ft_handler.version import __version__


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
