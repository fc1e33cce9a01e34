"""The encoder with products in 8-bit floats: what a CPU computes, what a GPU is given, files."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from encoder_support import random_weights
from quantized_support import (
    apart,
    exact_weights,
    float_weights,
    quantized_encoder,
    simulated_weights,
)  # fmt: skip
from torch import Tensor

import ft_handler
from ft_handler import precisions
from ft_handler.errors import ModelError
from ft_handler.model.encoder import Encoder
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.prepare import quantize

E4M3 = torch.float8_e4m3fn
PRODUCTS = ("qkv", "out", "up", "down")

# Width of the embeddings, stored layers, products that are kept.
KINDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "plain": (64, 3, ()),
    "mixed": (64, 3, ("layers.0.down", "layers.2.down", "layers.1.qkv")),
    "one product kept": (64, 3, ("layers.0.up", "layers.1.up", "layers.2.up")),
    "shared": (64, 1, ("layers.0.out",)),
    "projected": (24, 3, ("layers.1.down",)),
    "all kept": (64, 1, tuple(f"layers.0.{product}" for product in PRODUCTS)),
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
        intermediate_size=176,
        activation="gelu",
        layer_norm_eps=1e-12,
    )
    weights = random_weights(spec, stored=stored)
    return spec, weights, quantized_encoder(spec, weights, kept, "fp8")


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
def test_a_cpu_computes_the_floats(kind: str) -> None:
    """Weights are the file's, inputs are not rounded: nearer to fp32 than products in 8 bits."""
    spec, weights, encoder = parts(kind)
    inputs = batch()
    exact = twins.encode(*inputs, exact_weights(weights), spec.text(weights))
    simulated = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
    wanted = twins.encode(*inputs, float_weights(encoder), encoder.spec)
    module = torch.jit.script(encoder)
    found = module(*inputs)
    assert found.dtype == torch.float16
    assert module.narrow == []
    size = float(exact.square().mean().sqrt())
    assert apart(found, wanted) < 3e-3 * size
    if kind == "all kept":
        assert apart(wanted, exact) < 2e-3 * size
    else:
        assert apart(wanted, exact) < apart(simulated, exact) < 0.2 * size


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all kept"])
def test_what_a_gpu_is_given_is_the_simulation(kind: str) -> None:
    """The further tensors with their specification, in the twin of the op."""
    _, _, encoder = parts(kind)
    module: Any = torch.jit.script(encoder)
    inputs = batch()
    wanted = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
    given = module.layers.narrow()
    found = twins.encode(*inputs, [*float_weights(encoder), *given], encoder.narrow_spec)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert {tensor.dtype for tensor in given[::3]} == {E4M3}
    assert {tensor.dtype for tensor in given[1::3] + given[2::3]} == {torch.float32}


def test_what_it_is_called() -> None:
    words = {
        kind: dict(word.split("=", 1) for word in parts(kind)[2].narrow_spec.split())
        for kind in KINDS
    }
    assert words["all kept"] == {}
    assert "floats" not in words["plain"]
    assert "floats" not in words["shared"]  # a product that is kept everywhere is an fp16 one
    assert words["mixed"]["floats"] == "qkv:1;down:0,2"
    assert "layers.out.narrow" not in words["shared"]["weights"]
    assert "embeddings.projection.narrow" not in words["projected"]["weights"]
    assert words["one product kept"]["weights"].split(",")[-9:] == [
        f"layers.{product}.{part}"
        for product in ("qkv", "out", "down")
        for part in ("narrow", "narrow_scale", "input_scale")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_types_of_the_tensors(kind: str) -> None:
    _, weights, encoder = parts(kind)
    found = torch.jit.script(encoder).state_dict()
    for name, weight in weights.items():
        product = name.removesuffix(".weight")
        if f"{product}.scale" not in found:
            assert torch.equal(found[name], weight.half())
            continue
        rounded, scale, kept, inputs = (
            found[f"{product}.{n}"] for n in ("weight", "scale", "kept", "input_scale")
        )
        assert (rounded.dtype, scale.dtype, inputs.dtype) == (E4M3, torch.float32, torch.float32)
        assert kept.dtype == torch.float16
        assert rounded.shape[:2] == scale.shape
        assert len(rounded) + len(kept) == len(weight) == len(inputs)
        assert rounded.shape[1:] == kept.shape[1:] == weight.shape[1:]
        if len(rounded):
            assert torch.equal(rounded.float().abs().amax(-1), torch.full_like(scale, 448))
    assert {f"layers.{p}.scale" for p in PRODUCTS} <= set(found)


@pytest.mark.parametrize("kind", ["mixed", "shared", "projected", "all kept"])
def test_files_and_release(kind: str) -> None:
    module, inputs = torch.jit.script(parts(kind)[2]), batch()
    wanted = module(*inputs)
    again: Any = reloaded(module)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == again.state_dict()[name].dtype
        assert torch.equal(tensor.view(torch.uint8), again.state_dict()[name].view(torch.uint8))
    assert torch.equal(again(*inputs), wanted)
    before = [blob.data_ptr() for blob in again.prepared]
    again.release()
    again.release()
    assert torch.equal(again(*inputs), wanted)
    assert [blob.data_ptr() for blob in again.prepared] == before
    left = {name for name, tensor in again.state_dict().items() if tensor.numel() == 0}
    assert left >= {f"layers.{p}.{part}" for p in PRODUCTS for part in ("weight", "scale", "kept")}
    again.prepared = [torch.zeros_like(blob) for blob in again.prepared]
    with pytest.raises(torch.jit.Error, match="weights were released"):
        again(*inputs)


def test_weights_prepared_elsewhere_are_made_again() -> None:
    module, inputs = torch.jit.script(parts("mixed")[2]), batch()
    wanted = module(*inputs)
    for elsewhere in ([torch.zeros_like(b) for b in module.prepared], [torch.zeros(3)] * 4, []):
        module.prepared = elsewhere
        assert torch.equal(module(*inputs), wanted)
    # As a file has them that was saved on a GPU.
    module.narrow = module.layers.narrow()
    assert torch.equal(module(*inputs), wanted)
    assert module.narrow == []


def test_other_float_types_hold_the_same_weights() -> None:
    module, inputs = torch.jit.script(parts("mixed")[2]), batch()
    wanted, narrow = module(*inputs), module.layers.narrow()
    wide = module.float()
    assert wide(*inputs).dtype == torch.float32
    assert apart(wide(*inputs), wanted.float()) < 0.01
    for found, before in zip(wide.layers.narrow(), narrow, strict=True):
        assert torch.equal(found.view(torch.uint8), before.view(torch.uint8))


def test_tensors_that_are_missing_are_named() -> None:
    spec, weights, _ = parts("plain")
    tensors, layers = quantize.stored(spec, weights, precisions.get("fp8"), ())
    del tensors["layers.up.input_scale"]
    with pytest.raises(ModelError, match=r"missing layers\.up\.input_scale; unknown none"):
        Encoder(spec, tensors, layers)
    tensors, layers = quantize.stored(spec, weights, precisions.get("int8"), ())
    tensors["layers.up.input_scale"] = torch.ones(3)
    with pytest.raises(ModelError, match=r"missing none; unknown layers\.up\.input_scale"):
        Encoder(spec, tensors, layers)
