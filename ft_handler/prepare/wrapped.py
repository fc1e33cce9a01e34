"""Checkpoints as training scripts write them: tensors under a key or behind a prefix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft_handler.architectures.base import Architecture
from ft_handler.errors import ModelError
from ft_handler.prepare.hub import Source

#: Keys under which scripts keep a state dict beside their own notes.
_KEYS = ("state_dict", "model_state_dict", "model")
#: What wrappers of modules put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
SAFE_FILE = "model.safetensors"
_FILES = (SAFE_FILE, "pytorch_model.bin")


def wrapping_of(report: Mapping[str, Any]) -> str | None:
    """What transformers' report of a load says of a wrapping, None where there is none."""
    unread = {str(name) for name in report.get("unexpected_keys", ())}
    if not report.get("missing_keys"):
        return None
    for key in _KEYS:
        if key in unread:
            return f"{{{key!r}: ...}}"
    return next((f"{p}..." for p in _PREFIXES if any(n.startswith(p) for n in unread)), None)


def unwrapped(found: Mapping[str, Any], architecture: Architecture) -> dict[str, Tensor]:
    """The state dict inside a checkpoint's content, names without wrappers' prefixes, copied."""
    for key in _KEYS:
        inner = found.get(key)
        if isinstance(inner, Mapping):
            found = inner
    state = {
        str(name): value.clone(memory_format=torch.contiguous_format)
        for name, value in found.items()
        if isinstance(value, Tensor)
    }
    while True:
        wrapped = [n for n in state if not architecture.trains(n)]
        prefix = next((p for p in _PREFIXES if wrapped and wrapped[0].startswith(p)), None)
        if prefix is None or not all(n.startswith(prefix) for n in wrapped):
            return state
        state = {n.removeprefix(prefix): value for n, value in state.items()}


def state_dict(source: Source, cache_dir: str | None, folder: str = "") -> dict[str, Any]:
    """The content of a checkpoint's files of weights; raises ModelError where there are none.

    folder  where they lie in it, such as "2_Dense/"

    Raises pickle.UnpicklingError for a pickled file that holds more than tensors.
    """
    for name in (folder + file for file in _FILES):
        paths = [one for one in [source.file(name, cache_dir)] if one is not None]
        index = source.file(f"{name}.index.json", cache_dir) if not paths else None
        if index is not None:
            parts = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            paths = [p for part in parts if (p := source.file(part, cache_dir)) is not None]
        if paths:
            return {k: v for path in paths for k, v in _content(path).items()}
    raise ModelError(f"has no {' and no '.join(_FILES)}")


def _content(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(str(path)))
    return dict(torch.load(path, map_location="cpu", weights_only=True))
