"""Every architecture's encoder alone, pooled in every way, against transformers' hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, logits_of, write_model
from sentences import write_modules
from tiny import EMBEDDINGS
from tokenizers import Tokenizer
from torch import Tensor

from ft_handler import architectures
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace

pytest.importorskip("transformers")

TEXTS = [
    "A warm, funny film.",
    "a",
    "Großer Fluß – naïve café, 3 movies!",
    "an awful plot and a dull actor " * 40,
]
POOLINGS = ("cls", "mean", "max", "last")


def pooled(pooling: str, hidden: Tensor) -> Tensor:
    """One sequence's hidden states `[tokens, hidden]` as a vector."""
    return {
        "cls": hidden[0], "mean": hidden.mean(0), "max": hidden.amax(0), "last": hidden[-1]
    }[pooling]  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "pooling"), [(name, POOLINGS[i % 4]) for i, name in enumerate(FAMILIES)]
)
def test_vectors_are_transformers_own(model_type: str, pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "source"
    model = write_model(source, model_type, EMBEDDINGS)
    write_modules(source, pooling, normalize=True)
    options = TraceOptions(
        mode=EMBEDDINGS, model_name_or_path=str(source), output=tmp_path / "out", strict=True
    )
    answers: Any = Predictor.load(trace(options)).predict({"inputs": TEXTS})
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(architectures.get(model_type).positions(model.config))
    for text, answer in zip(TEXTS, answers, strict=True):
        encoded = tokenizer.encode(text)
        ids, types = torch.tensor([encoded.ids]), torch.tensor([encoded.type_ids])
        vector = pooled(pooling, logits_of(model, ids, torch.ones_like(ids), types)[0][0])
        assert answer == pytest.approx((vector / vector.norm()).tolist(), abs=1e-5)
    assert np.std(answers, axis=0).max() > 0.01  # they move with the text
