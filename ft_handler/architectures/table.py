"""One row an architecture: names in, stacked weights out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ft_handler.errors import ModelError
from ft_handler.model.info import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION

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
