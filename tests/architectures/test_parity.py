"""Every architecture's models, for every kind of task, held against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, KINDS, POSITIONS, apart, batch, fused, logits_of, random_model
from model_support import packed_of
from torch import Tensor

from ft_handler import architectures
from ft_handler.architectures.base import ACTIVATIONS
from ft_handler.architectures.mpnet import buckets
from ft_handler.tasks.base import AnyTask

pytest.importorskip("transformers")

LENGTHS = [[1], [7], [113], [POSITIONS], [33, 1, 128, 7, 64]]


def packed_form(task: AnyTask, wanted: list[Tensor], mask: Tensor) -> Tensor:
    """What the packed entry gives: `[B,C]`, or `[C,T]` where outputs are for each token."""
    if not task.per_token:
        return wanted[0]
    kept = [part[mask.bool()] for part in wanted]
    return torch.stack(kept) if kept[0].dim() == 1 else kept[0].t()


@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_transformers(model_type: str, kind: str, head_size: int) -> None:
    task = KINDS[kind]
    model = random_model(model_type, task, head_size)
    exact = fused(model, task, "fp32")
    for lengths in LENGTHS:
        inputs = batch(model, lengths)
        wanted = logits_of(model, *inputs)
        assert apart(task, exact(*inputs), wanted, inputs[1]) < 1e-4
        packed = exact.packed(*packed_of(*inputs))
        form = packed_form(task, wanted, inputs[1])
        torch.testing.assert_close(packed, form, rtol=0, atol=1e-4)
    assert max(float(w.std()) for w in wanted) > 0.05  # they move with the input


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_bfloat16_is_at_most_twice_as_wrong(model_type: str, kind: str) -> None:
    task = KINDS[kind]
    model = random_model(model_type, task, 64)
    half = fused(model, task, "bf16")
    batches = [batch(model, lengths) for lengths in LENGTHS]
    wanted = [logits_of(model, *inputs) for inputs in batches]
    model.bfloat16()
    theirs = ours = 0.0
    for inputs, exact in zip(batches, wanted, strict=True):
        theirs = max(theirs, apart(task, logits_of(model, *inputs), exact, inputs[1]))
        ours = max(ours, apart(task, half(*inputs), exact, inputs[1]))
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *(("bert", {"hidden_act": name}) for name in ACTIVATIONS),
        ("bert", {"type_vocab_size": 1, "embedding_size": 7}),  # a stray field
        ("roberta", {"type_vocab_size": 2, "pad_token_id": 3}),
        ("distilbert", {"activation": "relu"}),
        ("electra", {"embedding_size": 64, "hidden_act": "relu"}),
        ("albert", {"embedding_size": 64, "num_hidden_layers": 5}),
        ("albert", {"hidden_act": "gelu"}),
        ("mpnet", {"pad_token_id": 0}),
    ],
    ids=str,
)
def test_what_configurations_vary(model_type: str, changes: dict[str, Any]) -> None:
    task = KINDS["AutoModelForSequenceClassification"]
    model = random_model(model_type, task, **changes)
    inputs = batch(model, LENGTHS[-1])
    found = fused(model, task, "fp32")(*inputs)
    assert apart(task, found, logits_of(model, *inputs), inputs[1]) < 1e-4


def test_buckets_of_distances_are_transformers() -> None:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distances = torch.arange(-600, 601)
    ours = buckets()[distances.clamp(-128, 128) + 128]
    assert torch.equal(ours, MPNetEncoder.relative_position_bucket(distances))


@pytest.mark.parametrize("model_type", ["roberta", "mpnet"])
def test_a_pad_inside_a_text_is_a_token(model_type: str) -> None:
    """transformers leaves it out when it counts positions; here it has one of its own."""
    task = KINDS["AutoModelForSequenceClassification"]
    model = random_model(model_type, task)
    architecture = architectures.get(model_type)
    ids, mask, types = batch(model, [9])
    ids[0, 4] = architecture.pad(model.config)
    found = fused(model, task, "fp32")(ids, mask, types)[0]
    positions = torch.arange(9)[None] + architecture.first_position(model.config)
    with torch.no_grad():
        counted = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found, counted, rtol=0, atol=1e-4)
    assert float((found - logits_of(model, ids, mask, types)[0]).abs().max()) > 1e-3


def test_as_many_positions_as_the_longest_have() -> None:
    """8,194, two of which stand for pads."""
    task = KINDS["AutoModelForSequenceClassification"]
    changes = {"max_position_embeddings": 8194, "num_hidden_layers": 1}
    model = random_model("xlm-roberta", task, 8, **changes)
    exact = fused(model, task, "fp32")
    inputs = batch(model, [8192])
    assert apart(task, exact(*inputs), logits_of(model, *inputs), inputs[1]) < 1e-4
    beyond = batch(model, [8193])
    with pytest.raises((RuntimeError, torch.jit.Error), match="over the model's 8192 positions"):
        exact(*beyond)
