"""A checkpoint read with transformers, its adapter merged, its weights under the fused names."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ft_handler import architectures, tasks
from ft_handler.architectures.base import Architecture, Weights, listed
from ft_handler.errors import ModelError
from ft_handler.prepare.adapters import UNSAFE_PICKLE, Adapter, merge_adapter, read_adapter
from ft_handler.prepare.hf import first_line, import_transformers, quiet_transformers
from ft_handler.prepare.hub import resolve
from ft_handler.tasks.base import AnyTask, Head


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint ready to trace: transformers' model in fp32, its config and its weights."""

    model: Any
    config: Any
    architecture: Architecture
    weights: Weights
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
    """Load a checkpoint with transformers, merge `adapter`, and sort its weights.

    Raises ModelError for other architectures, weights left unset, and tensors left over.
    """
    task = tasks.get(mode)
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
    with _said_of(origin):
        architecture = architectures.get(str(getattr(config, "model_type", None)))
        architecture.check(config)
        head = architecture.head(task)
    brought = read_adapter(Path(adapter)) if adapter is not None else None
    _set_labels(config, task, head, brought, labels, origin)
    with quiet_transformers():
        try:
            model, report = getattr(transformers, task.auto_class).from_pretrained(
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
    with _said_of(origin):
        _check_report(report, architecture, task, head, brought)
    model = model.float().eval()
    if brought is not None:
        model = merge_adapter(model, brought)
    with _said_of(origin):
        weights = architecture.weights(task, config, model.state_dict())
    notes = [n for n in (source.note, config_source.note) if n]
    if brought is not None and brought.base not in (None, model_name_or_path, source.name):
        notes.append(f"the adapter was trained on {brought.base}, not on {model_name_or_path}")
    return Checkpoint(
        model=model,
        config=config,
        architecture=architecture,
        weights=weights,
        labels={int(i): str(n) for i, n in config.id2label.items()} if task.labelled else {},
        notes=tuple(dict.fromkeys(notes)),
    )


@contextlib.contextmanager
def _said_of(origin: str) -> Iterator[None]:
    """Put the checkpoint's name before what is wrong with it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{origin}: {error}") from error


def _set_labels(
    config: Any,
    task: AnyTask,
    head: Head,
    adapter: Adapter | None,
    labels: list[str] | None,
    origin: str,
) -> None:
    """Settle number and names of labels in the config, which shapes the head."""
    if not task.labelled:
        if labels:
            raise ModelError(f"labels are for tasks whose outputs have names, not for {task.name}")
        config.num_labels = task.columns(config)
        return
    outputs = None
    if adapter is not None and head.outputs is not None:
        outputs = adapter.head_outputs(head.outputs)
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
    report: Mapping[str, Any],
    architecture: Architecture,
    task: AnyTask,
    head: Head,
    adapter: Adapter | None,
) -> None:
    """Refuse a load that left weights random or tensors unread."""
    replaced = adapter.replaced.keys() if adapter is not None else set()
    missing = sorted(set(report.get("missing_keys", ())) - set(replaced))
    if missing:
        if all(name in head.weights.values() for name in missing):
            raise ModelError(
                f"has no trained head for {task.name} (lacks {listed(missing)}); take a "
                "fine-tuned checkpoint, or an --adapter that brings the head"
            )
        raise ModelError(f"leaves weights unset: {listed(missing)}")
    unknown = sorted(k for k in report.get("unexpected_keys", ()) if not architecture.ignores(k))
    if unknown:
        raise ModelError(f"holds tensors the model has no place for: {listed(unknown)}")
    mismatched = sorted(
        str(k[0] if isinstance(k, tuple) else k) for k in report.get("mismatched_keys", ())
    )
    if mismatched:
        raise ModelError(
            f"tensors of another shape than the configuration says: {listed(mismatched)}"
        )
    if report.get("error_msgs"):
        raise ModelError(listed([str(m) for m in report["error_msgs"]], 1))
