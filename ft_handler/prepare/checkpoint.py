"""A checkpoint read with transformers, its adapter merged, its weights under the fused names."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ft_handler import architectures, tasks
from ft_handler.architectures.base import Architecture, Weights, listed
from ft_handler.errors import ModelError
from ft_handler.prepare.adapters import UNSAFE_PICKLE, Adapter, merge_adapter, read_adapter
from ft_handler.prepare.beside import Beside
from ft_handler.prepare.hf import first_line, import_transformers, quiet_transformers
from ft_handler.prepare.hub import Source, resolve
from ft_handler.prepare.wrapped import SAFE_FILE, state_dict, unwrapped, wrapping_of
from ft_handler.tasks.base import AnyTask, Head, Tailored


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint ready to trace: transformers' model in fp32, its config and its weights.

    notes              where it came from
    doubts             what of it should be known before it is trusted
    function_to_apply  what its configuration makes of logits, where it says so
    tailored           the task as its files have it
    """

    model: Any
    config: Any
    architecture: Architecture
    weights: Weights
    labels: dict[int, str]
    notes: tuple[str, ...]
    doubts: tuple[str, ...]
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None
    tailored: Tailored


def load_checkpoint(
    mode: str,
    model_name_or_path: str,
    *,
    config_name: str | None = None,
    cache_dir: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    labels: list[str] | None = None,
    wishes: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Load a checkpoint with transformers, merge `adapter`, and sort its weights.

    wishes  as in `Task.tailored`

    Raises ModelError for other architectures, heads of other tasks, weights left unset, and tensors
    left over.
    """
    transformers = import_transformers()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

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
        tailored = tasks.get(mode).tailored(Beside(source, cache_dir), wishes or {})
        task = tailored.task
        architecture = architectures.get(str(getattr(config, "model_type", None)))
        architecture.check(config)
        head = architecture.head(task)
    brought = read_adapter(Path(adapter)) if adapter is not None else None
    _set_labels(config, task, head, brought, labels, origin)
    doubts = []
    with quiet_transformers(), _said_of(origin):
        try:
            model, report = _read(task, config, source, cache_dir)
            if wrapping := wrapping_of(report):
                state = unwrapped(state_dict(source, cache_dir), architecture)
                with tempfile.TemporaryDirectory() as scratch:
                    # transformers takes old spellings of names from files alone.
                    save_file(state, str(Path(scratch) / SAFE_FILE), metadata={"format": "pt"})
                    model, report = _read(task, config, Source(scratch, local_only=True), None)
                doubts.append(f"{origin}: its tensors are wrapped ({wrapping}), which was undone")
        except pickle.UnpicklingError as error:
            raise ModelError(UNSAFE_PICKLE) from error
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(first_line(error)) from error
        training = _check_report(report, architecture, task, head, brought, config)
        if brought is None or head.outputs is None or not brought.head_outputs(head.outputs):
            _check_kind(config, task)
        function = configured_function(config) if task.labelled else None
    if training:
        doubts.append(f"{origin}: holds tensors of training, left out: {listed(training)}")
    model = model.float().eval()
    if brought is not None:
        model = merge_adapter(model, brought)
    with _said_of(origin):
        state = {**model.state_dict(), **tailored.tensors}
        weights = architecture.weights(task, config, state)
    notes = [n for n in (source.note, config_source.note, *tailored.notes) if n]
    if brought is not None and brought.base not in (None, model_name_or_path, source.name):
        notes.append(f"the adapter was trained on {brought.base}, not on {model_name_or_path}")
    return Checkpoint(
        model=model,
        config=config,
        architecture=architecture,
        weights=weights,
        labels={int(i): str(n) for i, n in config.id2label.items()} if task.labelled else {},
        notes=tuple(dict.fromkeys(notes)),
        doubts=tuple(doubts),
        function_to_apply=function,
        tailored=tailored,
    )


def _read(task: AnyTask, config: Any, source: Source, cache_dir: str | None) -> tuple[Any, Any]:
    """transformers' model of a checkpoint, and its report of the load."""
    model, report = getattr(import_transformers(), task.auto_class).from_pretrained(
        source.name,
        config=config,
        cache_dir=cache_dir,
        local_files_only=source.local_only,
        dtype=torch.float32,
        weights_only=True,
        output_loading_info=True,
        # The report has both shapes of what does not fit, an error would have none.
        ignore_mismatched_sizes=True,
    )
    return model, report


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
        if sorted(config.id2label) != list(range(config.num_labels)):
            raise ModelError(
                f"{origin}: its id2label names the outputs {sorted(config.id2label)}, which are "
                "not numbered from 0 without gaps; --labels names them in order"
            )
        return
    if outputs is not None and len(labels) != outputs:
        raise ModelError(f"{len(labels)} labels were given, the adapter's head has {outputs}")
    # Of another number, they are held against the checkpoint's head when that is read.
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}


def _check_report(
    report: Mapping[str, Any],
    architecture: Architecture,
    task: AnyTask,
    head: Head,
    adapter: Adapter | None,
    config: Any,
) -> list[str]:
    """Refuse a load that left weights random or tensors unread; returns tensors of training."""
    replaced = adapter.replaced.keys() if adapter is not None else set()
    unset = set(report.get("missing_keys", ())) - set(replaced)
    missing = sorted(name for name in unset if architecture.uses(head, name))
    if missing:
        if all(name in head.weights.values() for name in missing):
            raise ModelError(
                f"has no trained head for {task.name} (lacks {listed(missing)}); take a "
                "fine-tuned checkpoint, or an --adapter that brings the head"
            )
        raise ModelError(f"leaves weights unset: {listed(missing)}")
    left = sorted(k for k in report.get("unexpected_keys", ()) if not architecture.ignores(k))
    training = [name for name in left if architecture.trains(name)]
    unknown = [name for name in left if name not in training]
    if unknown:
        raise ModelError(f"holds tensors the model has no place for: {listed(unknown)}")
    shapes = {name: (list(own), list(said)) for name, own, said in report["mismatched_keys"]}
    rows = head.weights.values() & shapes.keys()
    if task.labelled and rows and rows == shapes.keys():
        own, _ = shapes[min(rows)]
        raise ModelError(
            f"its head has {own[0]} outputs, but {config.num_labels} labels were given by its "
            "configuration or by --labels, which names all of them in order"
        )
    if shapes:
        told = [f"{n} is {own}, not {said}" for n, (own, said) in sorted(shapes.items())]
        raise ModelError(f"tensors of another shape than the configuration says: {listed(told)}")
    if report.get("error_msgs"):
        raise ModelError(listed([str(m) for m in report["error_msgs"]], 1))
    return training


def _check_kind(config: Any, task: AnyTask) -> None:
    """Refuse a checkpoint whose head was trained for another task; raises ModelError."""
    _, _, wanted = task.auto_class.partition("AutoModelFor")
    if not wanted:  # an encoder alone, which every checkpoint has
        return
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    others = [name for name in named if "For" in name and not name.endswith(wanted)]
    if others and len(others) == len(named):
        raise ModelError(
            f"its configuration's architectures say {listed(others)}, which is no model for "
            f"{task.name}"
        )


#: torch's modules by the last part of their name -> what they make of logits.
_FUNCTIONS: Mapping[str, Literal["sigmoid", "none"]] = {"Identity": "none", "Sigmoid": "sigmoid"}


def configured_function(config: Any) -> Literal["softmax", "sigmoid", "none"] | None:
    """What sentence-transformers configured for a model with one label; None where it did not.

    Raises ModelError for a function that is not served.
    """
    if config.num_labels != 1:
        return None
    newer = getattr(config, "sentence_transformers", None)
    named = newer.get("activation_fn") if isinstance(newer, Mapping) else None
    named = named or getattr(config, "sbert_ce_default_activation_function", None)
    if named is None:
        return None
    try:
        return _FUNCTIONS[str(named).rpartition(".")[2]]
    except KeyError:
        raise ModelError(
            f"its configuration asks for the activation {named}; served: Identity, Sigmoid"
        ) from None
