"""What the references are asked through: models, and the answers they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tokenizer_of(base: str) -> Any:
    """The tokenizer of a checkpoint, for texts of at most 512 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = min(tokenizer.model_max_length, 512)
    return tokenizer


def model_of(auto_class: str, base: str, adapter: str | None) -> Any:
    """transformers' model of a checkpoint, with an adapter's head and labels where there is one."""
    import torch
    import transformers

    auto = getattr(transformers, auto_class)
    if adapter is None:
        return auto.from_pretrained(base, dtype=torch.float32).eval()
    from peft import PeftModel

    file = Path(adapter) / "labels.json"
    named: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    outputs = 2 if auto_class.endswith("QuestionAnswering") else 1
    names = {int(i): name for i, name in named.items()} or {i: f"LABEL_{i}" for i in range(outputs)}
    model = auto.from_pretrained(
        base, dtype=torch.float32, num_labels=len(names), id2label=names,
        label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
