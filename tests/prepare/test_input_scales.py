"""Scales of inputs in 8-bit floats, made of weights alone: nothing lies beyond them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from encoder_support import random_weights
from families import FAMILIES, KINDS, batch, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_support import simulation_of
from torch import Tensor

from ft_handler import precisions
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.precisions import Precision
from ft_handler.prepare import input_scales as bounds
from ft_handler.prepare import quantize
from ft_handler.prepare.input_scales import Reach

FP8 = precisions.get("fp8")
#: What 16 bits may round beyond the largest float, which is lost on nobody.
ROUNDING = 1.001


def input_scales(
    spec: EncoderSpec, weights: dict[str, Tensor], precision: Precision = FP8
) -> dict[str, Tensor]:
    assert precision.quantized is not None
    stacks = quantize.rounded_stacks(weights, precision.quantized)
    return bounds.input_scales(spec, weights, precision, stacks)


class Watch:
    """The largest input of products so far, as a part of the largest float."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest = 0.0
        narrowed = twins.narrowed

        def watched(x: Tensor, scale: Tensor) -> Tensor:
            assert bool(torch.isfinite(x).all())
            found = x.abs().max() / scale / twins.LARGEST_NARROW
            self.largest = max(self.largest, float(found))
            return narrowed(x, scale)

        monkeypatch.setattr(twins, "narrowed", watched)


def spec_of(embedding: int, activation: str = "gelu", distance: int = 0) -> EncoderSpec:
    """Two layers of 32."""
    return EncoderSpec(
        hidden_size=32,
        embedding_size=embedding,
        num_layers=2,
        num_heads=2,
        intermediate_size=48,
        activation=activation,
        layer_norm_eps=1e-12,
        relative_distance=distance,
    )


def simulated(spec: EncoderSpec, weights: dict[str, Tensor]) -> list[twins.Weight]:
    """What the twin computes of a file in which nothing is kept."""
    tensors, _ = quantize.stored(spec, weights, FP8, ())
    return [
        tensors[name].float()
        if f"{(product := name.removesuffix('.weight'))}.scale" not in tensors
        else twins.narrow_layers(
            tensors[name],
            tensors[f"{product}.scale"],
            tensors[f"{product}.input_scale"],
            tensors[f"{product}.kept"],
            [],
        )
        for name in weights
    ]


def run(spec: EncoderSpec, weights: dict[str, Tensor], ids: Tensor, lengths: list[int]) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return twins.encode(
        ids, torch.zeros_like(ids), torch.zeros_like(ids), ends, max(lengths),
        simulated(spec, weights), spec.text(weights),
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    embedding=st.sampled_from([32, 12]),
    stored=st.sampled_from([1, 2]),
    activation=st.sampled_from(["gelu", "gelu_tanh", "relu", "silu", ""]),
    distance=st.sampled_from([0, 3]),
    spread=st.sampled_from([0.0, 1.0, 1.5]),
    outliers=st.booleans(),
)
def test_nothing_lies_beyond_the_largest_float(
    seed: int,
    embedding: int,
    stored: int,
    activation: str,
    distance: int,
    spread: float,
    outliers: bool,
) -> None:
    torch.manual_seed(seed)
    spec = spec_of(embedding, activation, distance)
    weights = random_weights(spec, stored=stored)
    for name, weight in weights.items():
        weight *= torch.exp(spread * torch.randn(weight.shape[-1]).clamp(-4, 4))
        if outliers and "embeddings" not in name:
            weight[..., int(torch.randint(weight.shape[-1], ()))] *= 50
    ids = torch.randint(0, 30, (40,))
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(monkeypatch)
        run(spec, weights, ids, [1, 1, 7, 31])
    assert 0 < watch.largest <= ROUNDING


@pytest.mark.parametrize("embedding", [32, 12])
def test_the_worst_input_reaches_it(embedding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that make values as large as the weights allow, each a text of its own."""
    spec = spec_of(embedding)
    weights = random_weights(spec)
    weights["layers.qkv.weight"] *= 10  # so that biases matter little
    gamma = weights["embeddings.norm.weight"]
    values = weights["layers.qkv.weight"][0, 64:]
    through = values if embedding == 32 else values @ weights["embeddings.projection.weight"]
    rows = through * gamma
    rows = torch.cat([rows, -rows, torch.eye(embedding), -torch.eye(embedding)])
    weights["embeddings.word"] = rows * 100
    for name in ("position", "token_type"):
        weights[f"embeddings.{name}"] *= 0
    watch = Watch(monkeypatch)
    ids = torch.arange(len(rows))
    scales = input_scales(spec, weights)
    run(spec, weights, ids, [1] * len(rows))
    assert watch.largest <= ROUNDING
    # A product's inputs may be off by a 16th of themselves, which the bound has to allow for.
    least = 0.85 if embedding == 32 else 0.4
    first = {name: scale[0] for name, scale in scales.items()}
    normal = twins.layer_norm(
        weights["embeddings.word"], gamma, weights["embeddings.norm.bias"], 1e-12
    )
    if embedding != 32:
        normal = twins.linear(
            normal,
            weights["embeddings.projection.weight"],
            weights["embeddings.projection.bias"],
            None,
        )
    else:
        assert float(normal.abs().max()) > 0.99 * 448 * float(first["layers.qkv"])
    made = normal @ values.T + weights["layers.qkv.bias"][0, 64:]
    assert float(made.abs().max()) > least * 448 * float(first["layers.out"])


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_reach_is_what_can_be_reached(diagonal: bool) -> None:
    reach = Reach(torch.randn(6) if diagonal else torch.randn(6, 9), torch.randn(6))
    weight, bias = torch.randn(4, 6), torch.randn(4)
    n = reach.slope.shape[-1]

    def inputs(z: Tensor) -> Tensor:
        """Columns of any numbers -> what a norm makes of them, put through the reach."""
        z = z - z.mean(0)
        z = z / z.norm(dim=0) * math.sqrt(n)
        return (reach.slope[:, None] * z if diagonal else reach.slope @ z) + reach.centre[:, None]

    made = reach.through(weight, bias)
    slope = torch.diag(reach.slope) if diagonal else reach.slope
    # The worst a row can meet lies along it; so it does for what a product makes of it.
    for rows, most, of in (
        (slope, reach.most, lambda x: x),
        (weight @ slope, made.most, lambda x: weight @ x + bias[:, None]),
    ):
        worst = of(inputs(torch.cat([rows.T, -rows.T], dim=1))).abs().amax(1)
        torch.testing.assert_close(worst, most)
        assert torch.all(of(inputs(torch.randn(n, 500))).abs().amax(1) <= most * 1.0001)
    sums = (weight.abs() @ inputs(torch.randn(n, 500)).abs()).amax(1)
    assert torch.all(sums <= reach.sizes(weight) * 1.0001)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_architecture_has_them(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = KINDS["AutoModelForSequenceClassification"]
    model: Any = random_model(model_type, task)
    simulation = simulation_of(model, task, "fp8")
    watch = Watch(monkeypatch)
    (packed,) = quantize.batches_of(quantize.of_padded(*batch(model, [33, 1, 7])))
    assert bool(torch.isfinite(simulation.quantized(packed, ())).all())
    assert 0.02 < watch.largest <= ROUNDING


def test_a_layer_that_serves_all_has_the_largest_scale() -> None:
    spec = spec_of(32)
    weights = random_weights(spec, stored=1)
    shared = input_scales(spec, weights)
    weights["embeddings.norm.weight"] *= 50
    larger = input_scales(spec, weights)
    assert all(len(scale) == 1 for scale in shared.values())
    assert larger["layers.qkv"] > 10 * shared["layers.qkv"]
    assert larger["layers.out"] > 10 * shared["layers.out"]
    # The norm in between makes no more of larger numbers.
    assert torch.equal(larger["layers.up"], shared["layers.up"])
    assert torch.equal(larger["layers.down"], shared["layers.down"])


def test_weights_of_zeros_take_any_scale() -> None:
    spec = spec_of(32)
    weights = {name: torch.zeros_like(w) for name, w in random_weights(spec).items()}
    assert all(bool((scale == 1).all()) for scale in input_scales(spec, weights).values())


def test_other_precisions_have_none() -> None:
    spec = spec_of(32)
    weights = random_weights(spec)
    assert input_scales(spec, weights, precisions.get("int8")) == {}
    assert bounds.input_scales(spec, weights, precisions.get("fp16"), {}) == {}
