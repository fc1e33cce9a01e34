"""What calibration makes of an encoder: the same model, of which 8 bits take less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, KINDS, batch, random_model
from quantized_support import apart, simulation_of
from torch import Tensor

from ft_handler import precisions
from ft_handler.native import twins
from ft_handler.prepare import calibration, quantize
from ft_handler.prepare.calibration import CENTRED, Calibrated, calibrated, rounded_better
from ft_handler.prepare.quantize import Drawn, Measured, Packed, Simulation

TASK = KINDS["AutoModelForSequenceClassification"]


def inputs_of(simulation: Simulation, product: str, texts: Packed) -> list[Tensor]:
    """What a product reads in fp32, layer by layer."""
    seen: list[Tensor] = []

    def watched(weight: Tensor) -> Any:
        def multiplied(x: Tensor) -> Tensor:
            seen.append(x)
            return x @ weight.T

        return multiplied

    weights = dict(simulation.encoder)
    order = quantize.weight_names(simulation.spec, quantize.PROJECTION[0] in weights)
    layers = twins.PreparedLayers(tuple(watched(w) for w in weights[f"{product}.weight"]))
    twins.encode(
        texts.input_ids, texts.token_type_ids, None, texts.cu_seqlens, texts.longest,
        [layers if name == f"{product}.weight" else weights[name] for name in order],
        simulation.spec.text(order),
    )  # fmt: skip
    return seen


def drawn(model: Any) -> Drawn:
    lengths = torch.randint(20, 120, (40,)).tolist()
    return Drawn.of(quantize.of_padded(*batch(model, lengths)))


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The largest input of each product in 8-bit floats, as a part of the largest float."""
    found: list[float] = []
    narrowed = twins.narrowed

    def watched(x: Tensor, scale: Tensor) -> Tensor:
        found.append(float(x.abs().max() / scale / twins.LARGEST_NARROW))
        return narrowed(x, scale)

    monkeypatch.setattr(twins, "narrowed", watched)
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_is_the_same_model_with_centred_inputs(model_type: str, largest: list[float]) -> None:
    model = random_model(model_type, TASK)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.mul_(10)  # columns far from zero
    plain, texts = simulation_of(model, TASK, "fp8"), drawn(model)
    assert texts.rounded_for is not None
    measured = Measured(plain, texts.measured, 1.0)
    better = rounded_better(measured, texts.rounded_for)
    made = better.simulation
    assert made is not plain
    assert better.quantized(()) < 0.9 * measured.quantized(())
    assert 0 < max(largest) <= 1.001
    for some in (*texts.measured, texts.rounded_for):
        assert apart(made.exact(some), plain.exact(some)) < 1e-4
    for product in CENTRED:
        inputs = inputs_of(made, product, texts.rounded_for)
        if len(made.encoder[f"{product}.weight"]) == 1:  # one layer serves all
            inputs = [torch.cat(inputs)]
        means = [float(x.mean(0).abs().max()) for x in inputs]
        if model_type == "albert" and product == "layers.qkv":
            assert max(means) > 0.1  # the head reads that norm as well
        else:
            assert max(means) < 1e-3


def test_all_that_a_precision_rounds_is_rounded_for_texts() -> None:
    model = random_model("albert", TASK)
    texts = drawn(model).rounded_for
    assert texts is not None
    for name, projection in (("int8", True), ("fp8", False)):
        simulation, row = simulation_of(model, TASK, name), precisions.get(name)
        assert row.quantized is not None
        found = calibrated(simulation.spec, simulation.encoder, row, texts)
        nearest = quantize.rounded_stacks(found.encoder, row.quantized)
        assert found.stacks.keys() == nearest.keys()
        assert ("embeddings.projection" in found.stacks) == projection
        for product, (weight, scale) in found.stacks.items():
            other, same = nearest[product]
            assert (weight.dtype, weight.shape) == (other.dtype, other.shape)
            assert torch.equal(scale, same)
            assert not torch.equal(weight.float(), other.float())


def test_what_does_not_help_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("bert", TASK)
    texts = drawn(model)
    assert texts.rounded_for is not None
    measured = Measured(simulation_of(model, TASK, "fp8"), texts.measured, 1.0)

    def worse(*arguments: Any) -> Calibrated:
        found = calibrated(*arguments)
        stacks = {name: (weight, scale * 1.1) for name, (weight, scale) in found.stacks.items()}
        return Calibrated(found.encoder, stacks)

    monkeypatch.setattr(calibration, "calibrated", worse)
    said: list[str] = []
    assert rounded_better(measured, texts.rounded_for, said.append) is measured
    assert said[0].startswith("weights rounded for texts: fp8 changes outputs by")
