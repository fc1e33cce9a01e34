"""The encoder with products in int8: the scheme, layers kept as floats, release and files."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from encoder_support import random_weights
from quantized_support import apart, exact_weights, quantized_encoder, rounding, simulated_weights
from torch import Tensor

import ft_handler
from ft_handler import precisions
from ft_handler.errors import ModelError
from ft_handler.model.encoder import PRODUCTS, Encoder, QuantizedProduct
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.prepare import quantize

# Width of the embeddings, stored layers, products that are kept.
KINDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "plain": (64, 3, ()),
    "mixed": (64, 3, ("layers.0.down", "layers.2.down", "layers.1.qkv")),
    "one product kept": (64, 3, ("layers.0.up", "layers.1.up", "layers.2.up")),
    "shared": (64, 1, ("layers.0.out",)),
    "projected": (24, 3, ("layers.1.down",)),
    "projection kept": (24, 1, ("embeddings.projection",)),
}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    ft_handler.load_library()


def parts(kind: str, layers: int = 3) -> tuple[EncoderSpec, dict[str, Tensor], Encoder]:
    """Sizes, fp32 weights and the encoder that is made of them."""
    embedding, stored, kept = KINDS[kind]
    spec = EncoderSpec(
        hidden_size=64,
        embedding_size=embedding,
        num_layers=layers,
        num_heads=2,
        intermediate_size=1096,  # three slices, the last one shorter
        activation="gelu",
        layer_norm_eps=1e-12,
    )
    weights = random_weights(spec, stored=stored)
    return spec, weights, quantized_encoder(spec, weights, kept)


def batch() -> tuple[Tensor, Tensor, None, Tensor, int]:
    """Packed arguments of `forward`: sequences of 1, 7 and 113 tokens."""
    ids, types = torch.randint(0, 30, (121,)), torch.randint(0, 2, (121,))
    return ids, types, None, torch.tensor([0, 1, 8, 121], dtype=torch.int32), 113


def reloaded(module: Any) -> Any:
    """What a file of the module gives back."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_simulation(kind: str) -> None:
    spec, weights, encoder = parts(kind)
    inputs = batch()
    exact = twins.encode(*inputs, exact_weights(weights), spec.text(weights))
    simulated = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
    found = torch.jit.script(encoder)(*inputs)
    assert found.dtype == torch.float16
    cost = apart(simulated, exact)
    assert 0 < apart(found, simulated) < rounding() * cost
    assert cost < 0.1 * float(exact.square().mean().sqrt())


@pytest.mark.parametrize("kind", ["shared", "projection kept"])
def test_one_layer_is_the_simulations_up_to_rounding(kind: str) -> None:
    spec, weights, encoder = parts(kind, layers=1)
    inputs = batch()
    exact = twins.encode(*inputs, exact_weights(weights), spec.text(weights))
    simulated = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
    found = torch.jit.script(encoder)(*inputs)
    # No layer comes after it to round otherwise what differs in its last bits.
    most = 0.05 if rounding() < 1 else 0.5
    assert apart(found, simulated) < most * apart(simulated, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_types_of_the_tensors(kind: str) -> None:
    _, weights, encoder = parts(kind)
    found = torch.jit.script(encoder).state_dict()
    for name, weight in weights.items():
        product = name.removesuffix(".weight")
        if f"{product}.scale" not in found:
            assert torch.equal(found[name], weight.half())
            continue
        quantized, scale, kept = (found[f"{product}.{n}"] for n in ("weight", "scale", "kept"))
        assert (quantized.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert kept.dtype == torch.bfloat16
        assert quantized.shape[:2] == scale.shape
        stack = weight if weight.dim() == 3 else weight[None]
        assert len(quantized) + len(kept) == len(stack)
        assert quantized.shape[1:] == kept.shape[1:] == stack.shape[1:]
        assert quantized.numel() == 0 or int(quantized.min()) >= -127
    assert {f"{p}.scale" for p in PRODUCTS if f"{p}.weight" in weights} <= set(found)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_release(kind: str) -> None:
    module, inputs = torch.jit.script(parts(kind)[2]), batch()
    wanted = module(*inputs)
    again = reloaded(module)
    assert torch.equal(again(*inputs), wanted)
    before = [blob.data_ptr() for blob in again.prepared]
    again.release()
    again.release()
    assert torch.equal(again(*inputs), wanted)
    assert [blob.data_ptr() for blob in again.prepared] == before
    left = {name for name, tensor in again.state_dict().items() if tensor.numel() == 0}
    assert left >= {
        f"layers.{p}.{kind}"
        for p in ("qkv", "out", "up", "down")
        for kind in ("weight", "scale", "kept")
    }
    again.prepared = [torch.zeros_like(blob) for blob in again.prepared]
    with pytest.raises(torch.jit.Error, match="weights were released"):
        again(*inputs)


def test_weights_prepared_elsewhere_are_made_again() -> None:
    module, inputs = torch.jit.script(parts("mixed")[2]), batch()
    wanted = module(*inputs)
    for elsewhere in ([torch.zeros_like(b) for b in module.prepared], [torch.zeros(3)] * 4, []):
        module.prepared = elsewhere
        assert torch.equal(module(*inputs), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_gpu_computes_is_close_to_fp32(kind: str) -> None:
    """The floats that a GPU prepares, in the place of the products, here on the CPU."""
    spec, weights, encoder = parts(kind)
    inputs = batch()
    exact = twins.encode(*inputs, exact_weights(weights), spec.text(weights))
    tensors = dict(encoder.named_buffers())
    floats: list[Tensor] = []
    modules = dict(encoder.named_modules())
    for name in weights:
        module = modules[name.rpartition(".")[0]]
        if isinstance(module, QuantizedProduct) and name.endswith(".weight"):
            dequantized = module.dequantized()
            assert dequantized.dtype == torch.float16
            assert dequantized.shape == weights[name].shape
            floats.append(dequantized)
        else:
            floats.append(tensors[name])
    found = twins.encode(*inputs, floats, encoder.spec)
    simulated = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
    # Inputs of products are not rounded there.
    assert apart(found, exact) < apart(simulated, exact)


def test_the_order_of_layers_survives() -> None:
    weight = torch.randn(4, 8, 16) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    tensors, layers = quantize.stored(
        parts("plain")[0], {"layers.down.weight": weight}, precisions.get("int8"), ["layers.1.down"]
    )
    assert layers == {"layers.down": [1]}
    product = QuantizedProduct(
        {**tensors, "layers.down.bias": torch.zeros(4, 8)}, "layers.down", [1]
    )
    scripted = torch.jit.script(product)
    for found in (product.dequantized(), scripted.dequantized()):
        steps = weight.abs().amax(-1, keepdim=True) / 127
        assert torch.all((found - weight)[[0, 2, 3]].abs() <= steps[[0, 2, 3]] * 0.501)
        torch.testing.assert_close(found[1], weight[1].bfloat16().float())


def test_tensors_that_are_missing_are_named() -> None:
    spec, weights, _ = parts("plain")
    tensors, layers = quantize.stored(spec, weights, precisions.get("int8"), ())
    del tensors["layers.up.scale"]
    with pytest.raises(ModelError, match=r"missing layers\.up\.scale; unknown none"):
        Encoder(spec, tensors, layers)
    with pytest.raises(ModelError, match=r"unknown layers\.down\.kept"):
        Encoder(spec, tensors)
