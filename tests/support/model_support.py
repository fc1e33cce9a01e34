"""Random BERT models in memory, their fused twins, and ragged batches."""

from __future__ import annotations

from typing import Any

import torch
from tiny import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from torch import Tensor

from ft_handler import architectures, precisions, tasks
from ft_handler.model import info
from ft_handler.prepare.fuse import fuse

POSITIONS = 64
VOCABULARY = 211


def random_bert(mode: str, **settings: Any) -> Any:
    """transformers' BERT with random weights, wide enough that logits move with the input."""
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    classes = {
        SEQUENCE_CLASSIFICATION: BertForSequenceClassification,
        QUESTION_ANSWERING: BertForQuestionAnswering,
        TOKEN_CLASSIFICATION: BertForTokenClassification,
    }
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.15,
    }
    values.update(settings)
    bert = classes[mode](BertConfig(**values)).eval()
    for name, parameter in bert.named_parameters():
        # transformers starts biases at 0 and norms at 1, which would hide a swap.
        if name.endswith("bias") or "LayerNorm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return bert


def fused(bert: Any, mode: str, data_type: str = "fp32") -> Any:
    """The scripted module made of a transformers model."""
    task, bert_itself = tasks.get(mode), architectures.get("bert")
    weights = bert_itself.weights(task, bert.config, bert.state_dict())
    return fuse(
        task,
        bert_itself.head(task),
        bert_itself.spec(bert.config),
        weights,
        precisions.get(data_type),
        bert.config.num_labels,
    )


def info_of(bert: Any, mode: str, **changes: Any) -> info.ModelInfo:
    """Metadata that fits a transformers model."""
    config = bert.config
    values: dict[str, Any] = {
        "format_version": info.FORMAT_VERSION,
        "mode": mode,
        "architecture": "bert",
        "data_type": "fp32",
        "model_type": "thsext",
        "remove_padding": True,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_positions": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "type_vocab_size": config.type_vocab_size,
        "num_labels": config.num_labels,
        "labels": dict(config.id2label) if tasks.get(mode).labelled else {},
        "problem_type": None,
        "do_lower_case": True,
        "layer_norm_eps": config.layer_norm_eps,
        "op_interface": 2,
        "versions": {"torch": str(torch.__version__), "transformers": "x", "ft_handler": "x"},
    }
    values.update(changes)
    return info.ModelInfo(**values)


def ragged(lengths: list[int], width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids, mask and types of the given lengths: three `[B,S]` int64."""
    width = max(lengths) if width is None else width
    columns = torch.arange(width)
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, VOCABULARY, (len(lengths), width)) * mask
    types = torch.randint(0, 2, (len(lengths), width)) * mask
    return ids, mask, types


def packed_of(ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The packed entry's arguments for prefix masks."""
    lengths = mask.sum(1)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    kept = mask.bool()
    return ids[kept], types[kept], cu_seqlens, int(lengths.max())


def hf_logits(bert: Any, ids: Tensor, mask: Tensor, types: Tensor) -> list[Tensor]:
    """What transformers answers, in fp32."""
    with torch.no_grad():
        out = bert(input_ids=ids, attention_mask=mask, token_type_ids=types, return_dict=False)
    return [part.float() for part in out]
