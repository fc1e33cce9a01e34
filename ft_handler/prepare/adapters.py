"""Reads PEFT adapters and merges them into a transformers model."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ft_handler.errors import EnvironmentProblem, ModelError

#: Label names that an adapter brings.
ADAPTER_LABELS = "labels.json"
UNSAFE_PICKLE = "its pickled file holds more than tensors, and nothing else is ever unpickled"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's folder: what it replaces outright, and how its head is shaped."""

    path: Path
    base: str | None
    replaced: dict[str, tuple[int, ...]]
    labels: list[str] | None

    def head_outputs(self, head: str) -> int | None:
        """Rows of the head the adapter brings, or None when it brings none."""
        shape = self.replaced.get(f"{head}.weight")
        return shape[0] if shape else None


def read_adapter(path: Path) -> Adapter:
    """Read an adapter's folder without building a model; raises ModelError in words."""
    settings = path / "adapter_config.json"
    if not settings.is_file():
        raise ModelError(f"{path}: no adapter_config.json; --adapter takes a PEFT adapter's folder")
    config = read_json_object(settings)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: a {config.get('peft_type')} adapter; only LORA is merged")
    shapes = {
        name.removeprefix(_PEFT_PREFIX): shape
        for name, shape in _tensor_shapes(path).items()
        if ".lora_" not in name
    }
    labels = path / ADAPTER_LABELS
    return Adapter(
        path=path,
        base=config.get("base_model_name_or_path"),
        replaced=shapes,
        labels=read_labels(labels) if labels.is_file() else None,
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ModelError in words."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: not a JSON object")
    return raw


def read_labels(path: Path) -> list[str]:
    """Labels from a JSON file such as `{"0": "negative", "1": "positive"}`, in order."""
    raw = read_json_object(path)
    try:
        named = {int(number): str(name) for number, name in raw.items()}
    except ValueError as error:
        raise ModelError(f"{path}: labels must map numbers to names") from error
    if sorted(named) != list(range(len(named))):
        raise ModelError(f"{path}: labels must be numbered from 0 without gaps")
    return [named[i] for i in range(len(named))]


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors."""
    safe, pickled = path / "adapter_model.safetensors", path / "adapter_model.bin"
    if safe.is_file():
        from safetensors import safe_open

        with safe_open(str(safe), framework="pt") as file:
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    if pickled.is_file():
        import torch

        try:
            state = torch.load(pickled, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelError(f"{path}: {UNSAFE_PICKLE}") from error
        return {k: tuple(v.shape) for k, v in state.items()}
    raise ModelError(f"{path}: no adapter_model.safetensors and no adapter_model.bin")


def merge_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Add the adapter's products into the model's weights and swap in the modules it saved.

    Raises ModelError when some of its tensors find no place or some stay unset.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise EnvironmentProblem("--adapter needs peft: pip install 'ft-handler[trace]'") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter.path))
            merged: nn.Module = wrapped.merge_and_unload()
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"{adapter.path}: does not fit the model: {first}") from error
    complaints = [str(w.message) for w in caught if "adapter keys" in str(w.message)]
    if complaints:
        raise ModelError(f"{adapter.path}: does not fit the model: {complaints[0][:300]}")
    state = merged.state_dict()
    for name, shape in adapter.replaced.items():
        if name not in state:
            raise ModelError(f"{adapter.path}: its tensor {name} has no place in the model")
        if tuple(state[name].shape) != shape:
            raise ModelError(
                f"{adapter.path}: its tensor {name} is {list(shape)}, "
                f"the model's is {list(state[name].shape)}"
            )
    return merged.eval()
