"""Every architecture on a GPU, held against transformers' own on the same GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, KINDS, POSITIONS, apart, batch, fused, logits_of, random_model

pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTHS = [[1], [7], [113], [POSITIONS], [33, 1, 128, 7, 64] * 8]


@pytest.mark.parametrize("data_type", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_transformers(
    model_type: str, kind: str, head_size: int, data_type: str
) -> None:
    """In fp32 to 1e-4, in half precision at most twice as wrong as transformers."""
    task = KINDS[kind]
    model = random_model(model_type, task, head_size)
    module = fused(model, task, data_type).to(DEVICE)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[data_type]
    low, exact = copy.deepcopy(model).to(DEVICE, dtype), model.to(DEVICE)
    ours = theirs = 0.0
    for lengths in LENGTHS:
        inputs = batch(model, lengths)
        inputs = inputs[0].to(DEVICE), inputs[1].to(DEVICE), inputs[2].to(DEVICE)
        wanted = logits_of(exact, *inputs)
        ours = max(ours, apart(task, module(*inputs), wanted, inputs[1]))
        theirs = max(theirs, apart(task, logits_of(low, *inputs), wanted, inputs[1]))
    assert ours <= (1e-4 if data_type == "fp32" else 2 * theirs)
