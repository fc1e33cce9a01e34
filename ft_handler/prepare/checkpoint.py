"""A checkpoint read with transformers, its adapter merged, its weights stacked."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft_handler.architectures.table import Architecture, check_config, listed, stack_weights
from ft_handler.errors import ModelError
from ft_handler.model.info import MODES, SEQUENCE_CLASSIFICATION
from ft_handler.prepare.adapters import UNSAFE_PICKLE, Adapter, merge_adapter, read_adapter
from ft_handler.prepare.hf import first_line, import_transformers, quiet_transformers
from ft_handler.prepare.hub import resolve

# -- loading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint ready to trace: transformers' model in fp32, its config and stacked weights."""

    model: Any
    config: Any
    architecture: str
    weights: dict[str, Tensor]
    labels: dict[int, str]
    notes: tuple[str, ...]


def load_checkpoint(
    mode: str,
    model_name_or_path: str,
    *,
    config_name: str | None = None,
    cache_dir: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    labels: list[str] | None = None,
) -> Checkpoint:
    """Load a checkpoint with transformers, merge `adapter`, and stack its weights.

    Raises ModelError for other architectures, weights left unset, and tensors left over.
    """
    if mode not in MODES:
        raise ModelError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    transformers = import_transformers()
    from safetensors import SafetensorError

    source = resolve(model_name_or_path, cache_dir)
    origin = model_name_or_path
    config_source = resolve(config_name, cache_dir) if config_name else source
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(
                config_source.name, cache_dir=cache_dir, local_files_only=config_source.local_only
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{config_name or origin}: {first_line(error)}") from error
    row = check_config(config, origin)
    brought = read_adapter(Path(adapter)) if adapter is not None else None
    _set_labels(config, mode, brought, labels, row.head_module[mode], origin)
    with quiet_transformers():
        try:
            model, report = getattr(transformers, row.auto_class[mode]).from_pretrained(
                source.name,
                config=config,
                cache_dir=cache_dir,
                local_files_only=source.local_only,
                dtype=torch.float32,
                weights_only=True,
                output_loading_info=True,
            )
        except pickle.UnpicklingError as error:
            raise ModelError(f"{origin}: {UNSAFE_PICKLE}") from error
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{origin}: {first_line(error)}") from error
    _check_report(report, row, mode, brought, origin)
    model = model.float().eval()
    if brought is not None:
        model = merge_adapter(model, brought)
    weights = stack_weights(row, mode, model.state_dict(), config.num_hidden_layers, origin)
    named = {int(i): str(n) for i, n in config.id2label.items()}
    notes = [n for n in (source.note, config_source.note) if n]
    if brought is not None and brought.base not in (None, model_name_or_path, source.name):
        notes.append(f"the adapter was trained on {brought.base}, not on {model_name_or_path}")
    return Checkpoint(
        model=model,
        config=config,
        architecture=config.model_type,
        weights=weights,
        labels=named if mode == SEQUENCE_CLASSIFICATION else {},
        notes=tuple(dict.fromkeys(notes)),
    )


def _set_labels(
    config: Any,
    mode: str,
    adapter: Adapter | None,
    labels: list[str] | None,
    head: str,
    origin: str,
) -> None:
    """Settle number and names of labels in the config, which shapes the head."""
    if mode != SEQUENCE_CLASSIFICATION:
        if labels:
            raise ModelError("labels are for sequence_classification")
        config.num_labels = 2
        return
    outputs = adapter.head_outputs(head) if adapter is not None else None
    if outputs is not None and outputs != config.num_labels:
        config.num_labels = outputs
    if labels is None and adapter is not None:
        labels = adapter.labels
    if labels is None:
        return
    if outputs is not None and len(labels) != outputs:
        raise ModelError(f"{len(labels)} labels were given, the adapter's head has {outputs}")
    if outputs is None and len(labels) != config.num_labels:
        raise ModelError(f"{len(labels)} labels were given, {origin} has {config.num_labels}")
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}


def _check_report(
    report: Mapping[str, Any], row: Architecture, mode: str, adapter: Adapter | None, origin: str
) -> None:
    """Refuse a load that left weights random or tensors unread."""
    replaced = adapter.replaced.keys() if adapter is not None else set()
    missing = sorted(set(report.get("missing_keys", ())) - set(replaced))
    if missing:
        heads = tuple(row.head[mode].values())
        if all(name in heads for name in missing):
            raise ModelError(
                f"{origin}: has no trained head for {mode} (lacks {listed(missing)}); take a "
                "fine-tuned checkpoint, or an --adapter that brings the head"
            )
        raise ModelError(f"{origin}: leaves weights unset: {listed(missing)}")
    unused = re.compile(row.unused.get(mode, r"(?!)"))
    unknown = sorted(k for k in report.get("unexpected_keys", ()) if not unused.fullmatch(k))
    if unknown:
        raise ModelError(f"{origin}: holds tensors the model has no place for: {listed(unknown)}")
    mismatched = [
        str(k[0] if isinstance(k, tuple) else k) for k in report.get("mismatched_keys", ())
    ]
    if mismatched:
        raise ModelError(f"{origin}: tensors of another shape than the configuration says: "
                         f"{listed(sorted(mismatched))}")  # fmt: skip
    if report.get("error_msgs"):
        raise ModelError(f"{origin}: {listed([str(m) for m in report['error_msgs']], 1)}")
