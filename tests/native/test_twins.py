"""The eager twins: small cases by hand, and the whole encoder against transformers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from encoder_support import random_weights
from model_support import hf_logits, ragged, random_bert
from op_arguments import SPEC
from tiny import QUESTION_ANSWERING

from ft_handler import architectures, tasks
from ft_handler.model.encoder import WEIGHTS
from ft_handler.native import twins


def test_padding_by_hand() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    types = torch.tensor([[0, 0, 1], [0, 1, 0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    packed, kinds, positions, indices, cu_seqlens, longest = twins.remove_padding(ids, types, mask)
    assert packed.tolist() == [5, 7, 8, 9]
    assert kinds.tolist() == [0, 1, 0, 1]
    assert positions.tolist() == [0, 2, 0, 1]
    assert indices.tolist() == [0, 2, 3, 4]
    assert cu_seqlens.tolist() == [0, 2, 4]
    assert longest == 2
    back = twins.restore_padding(packed, indices, 2, 3, -1)
    assert back.tolist() == [[5, -1, 7], [8, 9, -1]]


def test_rows_the_head_cannot_read_are_refused() -> None:
    ids = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="keeps no token"):
        twins.remove_padding(ids, ids, torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="column 0"):
        twins.remove_padding(ids, ids, torch.tensor([[1, 1], [0, 1]]))


def test_layer_norm_and_gelu_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0]])
    found = twins.residual_layer_norm(
        x, torch.tensor([1.0, 1.0]), x, torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.0]), 0.0
    )
    torch.testing.assert_close(found, torch.tensor([[-1.5, 2.0]]))
    value = twins.bias_activation(torch.tensor([[1.0]]), torch.tensor([0.5]), "gelu")
    assert math.isclose(float(value), 1.5 * 0.5 * (1 + math.erf(1.5 / math.sqrt(2))), rel_tol=1e-6)


def test_attention_by_hand() -> None:
    # One head of size 1: the first sequence has one token, so its answer is its own value.
    qkv = torch.tensor([[0.3, 0.2, 5.0], [0.0, 1.0, 1.0], [0.0, 2.0, 3.0]])
    out = twins.varlen_attention(qkv, torch.tensor([0, 1, 3], dtype=torch.int32), 2, 1)
    torch.testing.assert_close(out, torch.tensor([[5.0], [2.0], [2.0]]))


def test_activations_by_hand() -> None:
    x = 1.5
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    for name, wanted in (
        ("gelu_tanh", 0.5 * x * (1 + math.tanh(inner))),
        ("relu", x),
        ("silu", x / (1 + math.exp(-x))),
        ("", x),
    ):
        assert math.isclose(float(twins.activated(torch.tensor(x), name)), wanted, rel_tol=1e-6)


def test_a_relative_bias_by_hand() -> None:
    found = twins.bias_of_distances(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 4)
    assert found[0].tolist() == [[2, 3, 3, 3], [1, 2, 3, 3], [1, 1, 2, 3], [1, 1, 1, 2]]
    assert found[1, 0].tolist() == [5, 6, 6, 6]
    # Queries and keys are zero, so the bias alone shares the values out.
    qkv, sequence = torch.zeros(2, 3), torch.tensor([0, 2], dtype=torch.int32)
    qkv[:, 2] = torch.tensor([0.0, 1.0])
    bias = torch.tensor([[0.0, 0.0, math.log(3.0)]])
    out = twins.varlen_attention(qkv, sequence, 2, 1, bias)
    torch.testing.assert_close(out, torch.tensor([[0.75], [0.5]]))


def test_pooling_by_hand() -> None:
    rows = torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, -6.0]])
    sequences = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert twins.segment_pool(rows, sequences, "mean").tolist() == [[2, -3], [0, 0], [5, -6]]
    assert twins.segment_pool(rows, sequences, "max").tolist() == [[3, -2], [0, 0], [5, -6]]


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_packed_and_padded_agree_on_a_relative_bias(activation: str) -> None:
    spec = dataclasses.replace(SPEC, activation=activation)
    weights = random_weights(spec)
    ids, mask, types = ragged([9, 1, 30])
    ids %= 30
    kept = mask.bool()
    said, stacked = spec.text(weights), list(weights.values())
    packed_ids, kinds, positions, _, cu_seqlens, longest = twins.remove_padding(ids, types, mask)
    packed = twins.encode(packed_ids, kinds, positions, cu_seqlens, longest, stacked, said)
    padded = twins.padded_encode(ids, types, mask, stacked, said)[kept]
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    stacked[-1] = torch.zeros_like(stacked[-1])
    without = twins.encode(packed_ids, kinds, positions, cu_seqlens, longest, stacked, said)
    assert not torch.allclose(packed, without, rtol=1e-3, atol=1e-3)


def test_encoder_agrees_with_transformers_packed_and_padded() -> None:
    bert = random_bert(QUESTION_ANSWERING)
    bert_itself = architectures.get("bert")
    weights = bert_itself.weights(tasks.get(QUESTION_ANSWERING), bert.config, bert.state_dict())
    stacked = [weights.encoder[name] for name in WEIGHTS]
    spec = bert_itself.spec(bert.config).text(WEIGHTS)
    ids, mask, types = ragged([9, 1, 30])
    mask[2, 4] = 0
    kept = mask.bool()
    start, end = (part[kept] for part in hf_logits(bert, ids, mask, types))
    whole = twins.padded_encode(ids, types, mask, stacked, spec)[kept]
    packed_ids, kinds, positions, _, cu_seqlens, longest = twins.remove_padding(ids, types, mask)
    packed = twins.encode(packed_ids, kinds, positions, cu_seqlens, longest, stacked, spec)
    for hidden in (whole, packed):
        logits = hidden @ weights.head["qa_weight"].T + weights.head["qa_bias"]
        torch.testing.assert_close(logits[:, 0], start, rtol=0, atol=2e-5)
        torch.testing.assert_close(logits[:, 1], end, rtol=0, atol=2e-5)
