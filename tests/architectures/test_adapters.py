"""A LoRA adapter that brings the head, merged into every architecture's encoder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, logits_of, random_model
from tiny import SEQUENCE_CLASSIFICATION

from ft_handler import precisions, tasks
from ft_handler.errors import ModelError
from ft_handler.prepare.checkpoint import load_checkpoint
from ft_handler.prepare.fuse import fuse

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

#: What is adapted, by the ends of modules' names, and the head's modules.
NAMES: Mapping[str, tuple[list[str], list[str]]] = {
    "bert": (["query", "value", "output.dense"], ["pooler", "classifier"]),
    "roberta": (["query", "value", "output.dense"], ["classifier"]),
    "xlm-roberta": (["query", "key"], ["classifier"]),
    "camembert": (["value"], ["classifier"]),
    "distilbert": (["q_lin", "v_lin", "lin2"], ["pre_classifier", "classifier"]),
    "electra": (["query", "value", "embeddings_project"], ["classifier"]),
    "albert": (["query", "ffn", "embedding_hidden_mapping_in"], ["pooler", "classifier"]),
    "mpnet": (["attn.q", "attn.o"], ["classifier"]),
}


def test_all_are_tested() -> None:
    assert NAMES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_merged_adapter_answers_like_peft(model_type: str, tmp_path: Path) -> None:
    task = tasks.get(SEQUENCE_CLASSIFICATION)
    model: Any = random_model(model_type, task, num_labels=5)
    model.base_model.save_pretrained(tmp_path / "base")
    adapted, head = NAMES[model_type]
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules=adapted, modules_to_save=head
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an old name
        wrapped = peft.get_peft_model(model, settings).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    found = load_checkpoint(
        SEQUENCE_CLASSIFICATION, str(tmp_path / "base"), adapter=tmp_path / "adapter"
    )
    assert found.labels == {i: f"LABEL_{i}" for i in range(5)}
    module = fuse(
        task,
        found.architecture.head(task),
        found.architecture.spec(found.config),
        found.weights,
        precisions.get("fp32"),
        5,
    )
    ids = torch.randint(10, 200, (2, 19))
    mask = torch.ones_like(ids)
    wanted = logits_of(wrapped, ids, mask, ids * 0)[0]
    torch.testing.assert_close(module(ids, mask, ids * 0)[0], wanted, rtol=0, atol=1e-4)
    with pytest.raises(ModelError, match="no trained head"):
        load_checkpoint(SEQUENCE_CLASSIFICATION, str(tmp_path / "base"))
