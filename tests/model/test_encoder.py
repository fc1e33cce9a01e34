"""The scriptable encoder: names, preparation at need, moves, release and files."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from encoder_support import GEMM_WEIGHTS, random_weights
from torch import Tensor

import ft_handler
from ft_handler.errors import ModelError
from ft_handler.model.encoder import WEIGHTS, Encoder, weight_names
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins

BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Width of the embeddings, stored layers, D of a relative bias.
KINDS = {
    "plain": (64, 3, 0),
    "shared": (64, 1, 0),
    "projected": (24, 3, 0),
    "both": (24, 1, 0),
    "biased": (64, 3, 5),
    "all": (24, 1, 127),
}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    ft_handler.load_library()


def specification(
    heads: int = 2, embedding: int = 64, distance: int = 0, activation: str = "gelu"
) -> EncoderSpec:
    """Three small layers."""
    return EncoderSpec(
        hidden_size=64,
        embedding_size=embedding,
        num_layers=3,
        num_heads=heads,
        intermediate_size=72,
        activation=activation,
        layer_norm_eps=1e-12,
        relative_distance=distance,
    )


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, None, Tensor, int]:
    """Packed arguments of `forward`."""
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids, types = torch.randint(0, 30, (tokens,)), torch.randint(0, 2, (tokens,))
    return ids, types, None, cu_seqlens, max(lengths, default=0)


def scripted(spec: EncoderSpec, weights: dict[str, Tensor]) -> Any:
    """The module as a traced file holds it."""
    return torch.jit.script(Encoder(spec, weights).eval())


def made(kind: str = "plain", dtype: torch.dtype = torch.float32, heads: int = 2) -> Any:
    """A scripted encoder with random weights."""
    embedding, stored, distance = KINDS[kind]
    spec = specification(heads, embedding, distance)
    return scripted(spec, random_weights(spec, dtype, stored=stored))


def reloaded(module: Any) -> Any:
    """What a file of the module gives back."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_twin(kind: str, heads: int, dtype: torch.dtype) -> None:
    embedding, stored, distance = KINDS[kind]
    spec = specification(heads, embedding, distance)
    weights = random_weights(spec, dtype, stored=stored)
    module = scripted(spec, weights)
    for lengths in ([1], [7], [113], [511], [1, 7, 113, 511], [3, 0, 2], [], [0, 0]):
        inputs = batch(lengths)
        found = module(*inputs)
        wanted = twins.encode(*inputs, list(weights.values()), spec.text(weights))
        assert found.dtype == dtype
        bound = BOUNDS[dtype]
        torch.testing.assert_close(found.float(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "silu"])
def test_activations(activation: str) -> None:
    spec = specification(activation=activation)
    weights, inputs = random_weights(spec), batch([1, 7, 113])
    # Large enough for the feed-forward block that one activation is no other.
    weights["layers.up.bias"] = torch.randn(3, 72) * 2
    found = scripted(spec, weights)(*inputs)
    wanted = twins.encode(*inputs, list(weights.values()), spec.text(weights))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    other = scripted(specification(), weights)(*inputs)
    assert not torch.allclose(found, other, rtol=1e-4, atol=1e-4)


def test_the_interface_that_an_encoder_needs() -> None:
    assert specification(embedding=24).op_interface == 2
    for activation in ("gelu_tanh", "relu", "silu"):
        assert specification(activation=activation).op_interface == 3
    assert specification(distance=1).op_interface == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_are_those_of_the_weights(kind: str) -> None:
    embedding, stored, distance = KINDS[kind]
    spec = specification(2, embedding, distance)
    weights = random_weights(spec, stored=stored)
    module = scripted(spec, weights)
    assert tuple(weights) == weight_names(spec)
    assert sorted(module.state_dict()) == sorted(weights)
    for name, tensor in reloaded(module).state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert module.max_positions == 512
    assert module.spec == spec.text(weights)


def test_weights_that_are_missing_or_unknown_are_named() -> None:
    spec = specification()
    weights = random_weights(spec)
    weights["layers.gate.weight"] = weights.pop("layers.up.bias")
    with pytest.raises(ModelError, match=r"missing layers\.up\.bias; unknown layers\.gate\.weight"):
        Encoder(spec, weights)
    with pytest.raises(ModelError, match=r"missing embeddings\.projection\.bias, embeddings"):
        Encoder(specification(2, 24), random_weights(spec))
    with pytest.raises(ModelError, match=r"missing attention\.relative_bias; unknown none"):
        Encoder(specification(distance=4), random_weights(specification()))
    with pytest.raises(ModelError, match=r"missing none; unknown attention\.relative_bias"):
        Encoder(specification(), random_weights(specification(distance=4)))
    assert len(WEIGHTS) == 17


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_saved_file_answers_the_same(kind: str, when: str) -> None:
    module, inputs = made(kind), batch([1, 7, 113])
    if when == "after":
        module.prepare()
    again = reloaded(module)
    assert torch.equal(again(*inputs), module(*inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_a_change_of_type(kind: str) -> None:
    module, inputs = made(kind), batch([1, 7, 113])
    exact = module(*inputs)
    half = module.half()(*inputs)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=1e-2, atol=1e-2)
    back = module.float()(*inputs)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, half.float(), rtol=1e-2, atol=1e-2)


def test_weights_prepared_elsewhere_are_made_again() -> None:
    module, inputs = made(), batch([9, 4])
    wanted = module(*inputs)
    for elsewhere in (
        [torch.zeros_like(blob) for blob in module.prepared],
        [torch.zeros(3) for _ in module.prepared],
        [],
    ):
        module.prepared = elsewhere
        assert torch.equal(module(*inputs), wanted)


def test_prepared_weights_stay() -> None:
    module = made()
    assert module.prepared == []
    module.prepare()
    before = [blob.data_ptr() for blob in module.prepared]
    assert len(before) == 4
    module(*batch([9]))
    assert [blob.data_ptr() for blob in module.prepared] == before


@pytest.mark.parametrize("kind", KINDS)
def test_release_drops_the_unpacked_weights(kind: str) -> None:
    module, inputs = made(kind), batch([1, 7, 113])
    wanted = module(*inputs)
    module.release()
    module.release()
    assert torch.equal(module(*inputs), wanted)
    for name, tensor in module.state_dict().items():
        assert (tensor.numel() == 0) == (name in GEMM_WEIGHTS)
    module.half()
    with pytest.raises(torch.jit.Error, match=r"weights were released.*load the model file again"):
        module(*inputs)
    with pytest.raises(torch.jit.Error, match="weights were released"):
        module.prepare()


def test_a_file_saved_after_a_release_says_so_on_another_processor() -> None:
    module, inputs = made(), batch([9, 4])
    module.release()
    again = reloaded(module)
    # As it is where the blobs are of another instruction set.
    again.prepared = [torch.zeros_like(blob) for blob in again.prepared]
    with pytest.raises(torch.jit.Error, match="saved after the release has to be made again"):
        again(*inputs)


def test_options_reach_the_op() -> None:
    module, inputs = made(), batch([9, 4])
    wanted = module(*inputs)
    module.configure("batch_invariant few_tokens=0")
    assert torch.equal(module(*inputs), wanted)
    module.configure("quick")
    with pytest.raises(RuntimeError, match='option "quick" is unknown'):
        module(*inputs)


def test_without_torchscript_it_is_the_same() -> None:
    spec = specification(2, 24)
    weights = random_weights(spec)
    plain, inputs = Encoder(spec, weights).eval(), batch([9, 4])
    wanted = scripted(spec, weights)(*inputs)
    assert torch.equal(plain(*inputs), wanted)
    plain.release()
    assert torch.equal(plain(*inputs), wanted)
