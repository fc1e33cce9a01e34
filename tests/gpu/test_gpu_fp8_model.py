"""Encoders and whole models in fp8 on the GPU, against the float simulation of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from encoder_support import random_weights
from families import FAMILIES, KINDS, batch, fused, random_model
from quantized_support import (
    apart,
    exact_weights,
    float_weights,
    quantized_encoder,
    simulated_weights,
    simulation_of,
)  # fmt: skip
from torch import Tensor

from ft_handler import load_library
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins
from ft_handler.prepare import quantize

pytestmark = pytest.mark.gpu

PRODUCTS = ("qkv", "out", "up", "down")
# Width of the embeddings, stored layers, products that are kept.
MODELS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "plain": (256, 3, ()),
    "mixed": (256, 3, ("layers.0.down", "layers.2.down", "layers.1.qkv", "layers.1.up")),
    "out kept": (256, 3, tuple(f"layers.{i}.out" for i in range(3))),
    "shared": (256, 1, ("layers.0.out",)),
    "projected": (64, 3, ("layers.1.down",)),
    "all kept": (256, 1, tuple(f"layers.0.{p}" for p in PRODUCTS)),
    **{
        f"{one} alone": (256, 1, tuple(f"layers.0.{p}" for p in PRODUCTS if p != one))
        for one in PRODUCTS
    },
}
FEW: list[list[int]] = [[1], [7], [113], [511], [1, 7, 113], [5, 0, 17, 9]]
MANY: list[list[int]] = [[511, 113, 7, 1] * 7, [512] * 9, [30] * 150, [4] * 1100]
# Up to so many tokens kernels of their own may take an encoder, which read its weights as floats.
FEW_TOKENS = 96
# Of two ways that differ in the last bits of their sums, the second rounds some of its inputs to
# another number of 8 bits; in one product that is up to 0.3 of what the rounding itself changes
# (found by changing norms and biases by a 2000th), and what comes after rounds on from there.
ONE_PRODUCT = 0.4


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_library()


def served() -> bool:
    """Whether this GPU has products of 8-bit floats."""
    like = torch.empty(1, 256, 256, dtype=torch.float16, device="cuda")
    found: bool = torch.ops.fastertransformer.serves_narrow(like)
    return found


def parts(
    kind: str, activation: str = "gelu", layers: int = 3
) -> tuple[EncoderSpec, dict[str, Tensor], Any]:
    """Sizes, fp32 weights on the GPU and the encoder of them, not scripted."""
    embedding, stored, kept = MODELS[kind]
    spec = EncoderSpec(
        hidden_size=256,
        embedding_size=embedding,
        num_layers=layers,
        num_heads=4,
        intermediate_size=1024,
        activation=activation,
        layer_norm_eps=1e-12,
    )
    weights = random_weights(spec, stored=stored)
    encoder = quantized_encoder(spec, weights, kept, "fp8").cuda()
    return spec, {name: weight.cuda() for name, weight in weights.items()}, encoder


def packed(
    lengths: Sequence[int], device: str = "cuda"
) -> tuple[Tensor, Tensor, None, Tensor, int]:
    """Packed arguments of `forward`."""
    total = sum(lengths)
    ids, types = torch.arange(total) * 7 % 30, torch.arange(total) % 2
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids.to(device), types.to(device), None, ends.to(device), max(lengths)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_one_product(product: str, activation: str) -> None:
    _, _, encoder = parts(f"{product} alone", activation, layers=1)
    module: Any = torch.jit.script(encoder)
    for lengths in FEW + MANY:
        inputs = packed(lengths)
        narrow = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
        floats = twins.encode(*inputs, float_weights(encoder), encoder.spec)
        found = module(*inputs)
        assert found.dtype == torch.float16
        between = apart(narrow, floats)
        ways = {"narrow": apart(found, narrow) / between, "floats": apart(found, floats) / between}
        if not served():
            assert ways["floats"] < 0.1, lengths
        elif sum(lengths) > FEW_TOKENS:
            assert ways["narrow"] < ONE_PRODUCT < ways["floats"], lengths
        else:
            assert min(ways.values()) < ONE_PRODUCT, lengths


@pytest.mark.parametrize("kind", MODELS)
def test_no_worse_than_the_simulation(kind: str) -> None:
    spec, weights, encoder = parts(kind)
    module: Any = torch.jit.script(encoder)
    for lengths in FEW + MANY:
        inputs = packed(lengths)
        exact = twins.encode(*inputs, exact_weights(weights), spec.text(weights))
        narrow = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
        found = module(*inputs)
        assert found.dtype == torch.float16
        assert bool(torch.isfinite(found).all())
        assert (len(module.narrow) > 0) == (served() and kind != "all kept")
        if kind == "all kept":
            assert apart(found, exact) < 3e-3 * apart(exact, torch.zeros_like(exact))
        else:
            # Of one short sequence an error is a matter of chance.
            room = 1.2 if sum(lengths) > FEW_TOKENS else 2.0
            assert apart(found, exact) < room * apart(narrow, exact), lengths


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_other_activations(activation: str) -> None:
    spec, weights, encoder = parts("mixed", activation)
    module: Any = torch.jit.script(encoder)
    inputs = packed(MANY[0])
    exact = twins.encode(*inputs, exact_weights(weights), spec.text(weights))
    narrow = twins.encode(*inputs, simulated_weights(encoder), encoder.spec)
    assert apart(module(*inputs), exact) < 1.2 * apart(narrow, exact)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_architecture(model_type: str) -> None:
    task = KINDS["AutoModelForSequenceClassification"]
    model = random_model(model_type, task, 64)
    simulation = simulation_of(model, task, "fp8")
    inputs = batch(model, [1, 7, 113, 64] * 24)
    ids, mask, types = inputs
    rows = [
        (row[:n], kinds[:n])
        for row, kinds, n in zip(ids.tolist(), types.tolist(), mask.sum(1).tolist(), strict=True)
    ]
    whole = quantize.Packed.of(rows)
    assert len(whole.input_ids) > FEW_TOKENS
    exact, floats = simulation.exact(whole), simulation.on_a_cpu(whole, ())
    wanted = simulation.quantized(whole, ()) if served() else floats
    module = fused(model, task, "fp8").cuda()
    found = module.packed(
        whole.input_ids.cuda(), whole.token_type_ids.cuda(), whole.cu_seqlens.cuda(), whole.longest
    ).cpu()
    assert apart(found, exact) < 1.5 * apart(wanted, exact)
    (padded,) = module(*(part.cuda() for part in inputs))
    assert apart(padded.cpu(), found) < 0.1 * apart(wanted, exact)


@pytest.mark.parametrize("kind", ["mixed", "shared", "projected"])
def test_release_keeps_what_is_needed(kind: str) -> None:
    written = io.BytesIO()
    torch.jit.save(torch.jit.script(parts(kind)[2]), written)
    written.seek(0)  # a scripted module shares its weights with the one it was made of
    module: Any = torch.jit.load(written, map_location="cuda")
    few, many = packed([1, 7, 113]), packed(MANY[0])
    wanted = module(*few), module(*many)
    before = [tensor.data_ptr() for tensor in [*module.prepared, *module.narrow]]
    held = torch.cuda.memory_allocated()
    module.release()
    left = {name for name, tensor in module.state_dict().items() if tensor.numel() == 0}
    assert left >= {f"layers.{p}.{part}" for p in ("qkv", "up") for part in ("weight", "scale")}
    assert torch.cuda.memory_allocated() < held
    assert torch.equal(module(*few), wanted[0])
    assert torch.equal(module(*many), wanted[1])
    assert [tensor.data_ptr() for tensor in [*module.prepared, *module.narrow]] == before
    module = module.cpu()
    with pytest.raises(torch.jit.Error, match="weights were released"):
        module(*packed([7], "cpu"))


def test_moves() -> None:
    module: Any = torch.jit.script(parts("mixed")[2])
    inputs = packed(MANY[0])
    wanted = module(*inputs)
    module = module.cpu()
    on_cpu = module(*packed([7, 113], "cpu"))
    assert module.narrow == []
    module = module.cuda()
    assert torch.equal(module(*inputs), wanted)
    assert (len(module.narrow) > 0) == served()
    if not served():
        assert apart(module(*packed([7, 113])).cpu(), on_cpu.float()) < 0.01


def test_a_graph_computes_the_same() -> None:
    module: Any = torch.jit.script(parts("mixed")[2])
    inputs = packed(MANY[0])
    wanted = module(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(*inputs)
    graph.replay()
    assert torch.equal(found, wanted)


def test_a_sequence_does_not_see_its_batch() -> None:
    """Scales are known beforehand, so with that option what shares a batch changes no bit."""
    module: Any = torch.jit.script(parts("plain")[2])
    module.configure("batch_invariant")
    whole, ids, types = module(*packed([512] * 9)), *packed([512] * 9)[:2]
    for sequences in (8, 1):
        tokens = sequences * 512
        ends = torch.arange(0, tokens + 1, 512, device="cuda").int()
        found = module(ids[:tokens], types[:tokens], None, ends, 512)
        assert torch.equal(found, whole[:tokens])
