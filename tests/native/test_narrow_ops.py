"""Products of 8-bit floats: the eager scheme, the order that kernels read, and the ops on a CPU."""

from __future__ import annotations

import pytest
import torch
from encoder_support import random_weights
from torch import Tensor

from ft_handler.model.spec import EncoderSpec
from ft_handler.native import ops, twins

E4M3 = torch.float8_e4m3fn


def every_number() -> Tensor:
    """All finite numbers of e4m3 in rising order, from their bits."""
    found = set()
    for bits in range(127):
        exponent, fraction = bits >> 3, bits & 7
        size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
        found |= {size, -size}
    return torch.tensor(sorted(found))


def drawn(*shape: int) -> Tensor:
    """Random e4m3 numbers."""
    return (torch.randn(*shape) * 40).clamp(-448, 448).to(E4M3)


def test_inputs_become_the_nearest_numbers() -> None:
    numbers = every_number()
    x = torch.cat([numbers * 0.3, torch.randn(200) * 30, torch.randn(200) * 1e-3])
    found = twins.narrowed(x, 0.3).float()
    distances = (x[:, None] / 0.3 - numbers).abs()
    torch.testing.assert_close((x / 0.3 - found).abs(), distances.min(1).values)
    assert torch.equal(found[: len(numbers)], numbers)


def test_the_ends_of_the_numbers() -> None:
    x = torch.tensor([448.0, 463.0, 1e6, -1e6, torch.inf, -torch.inf, torch.nan, 2.0**-11])
    found = twins.narrowed(x, 1.0).float()
    assert found[:6].tolist() == [448, 448, 448, -448, 448, -448]
    assert found[6].isnan()
    assert found[7] == 0


def test_a_product_is_what_it_says() -> None:
    x, weight, scale = torch.randn(5, 48) * 3, drawn(7, 48), torch.rand(7) / 400
    step = torch.tensor(0.05)
    found = twins.narrow_product(x, weight, scale * step, step)
    rounded = twins.narrowed(x, step).double() * 0.05
    wanted = rounded @ (weight.double() * scale[:, None].double()).T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    exact = x @ (weight.float() * scale[:, None]).T
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


def test_the_order_of_columns() -> None:
    weight = torch.arange(32).float().to(E4M3)[None, None]  # up to 16 each number has a place
    found = ops.prepare_narrow(weight)
    assert found.dtype == E4M3
    assert found[0, 0, :16].float().tolist() == [
        0,
        1,
        8,
        9,
        2,
        3,
        10,
        11,
        4,
        5,
        12,
        13,
        6,
        7,
        14,
        15,
    ]


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 48), (2, 33, 1072)])
def test_the_order_is_the_twins(shape: tuple[int, ...]) -> None:
    weight = drawn(*shape)
    found = ops.prepare_narrow(weight)
    assert torch.equal(found.view(torch.int8), twins.prepare_narrow(weight).view(torch.int8))
    again = ops.prepare_narrow(weight.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(again.view(torch.int8), found.view(torch.int8))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(1, 4, 16), "weight must have dtype float8_e4m3fn, has float32"),
        (torch.zeros(1, 4, 24).to(E4M3), r"K a multiple of 16, has \[1, 4, 24\]"),
        (torch.zeros(4, 16).to(E4M3), r"shape \[L, N, K\] .* has \[4, 16\]"),
        (torch.zeros(1, 4, 0).to(E4M3), r"has \[1, 4, 0\]"),
    ],
)
def test_what_has_no_order_is_refused(weight: Tensor, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        ops.prepare_narrow(weight)


def test_no_cpu_serves_it() -> None:
    assert ops.serves_narrow(torch.zeros(1, 4, 16).half()) is False


def test_opcheck() -> None:
    # torch's checker of schemas compares tensors, which it cannot do for 8-bit floats.
    checks = ("test_autograd_registration", "test_faketensor")
    named = torch.ops.fastertransformer
    torch.library.opcheck(named.prepare_narrow.default, (drawn(2, 4, 32),), test_utils=checks)
    torch.library.opcheck(
        named.serves_narrow.default, (torch.zeros(3),), test_utils=("test_schema", checks[0])
    )


@pytest.mark.parametrize("stored", [3, 1])
def test_the_encoder_reads_what_the_op_is_given(stored: int) -> None:
    """Tensors beside the float weights, in any order, against products that know what they are."""
    spec = EncoderSpec(
        hidden_size=32,
        embedding_size=32,
        num_layers=3,
        num_heads=2,
        intermediate_size=48,
        activation="relu",
        layer_norm_eps=1e-12,
    )
    weights = random_weights(spec, stored=stored)
    floats = {"qkv": [0], "down": [1, 2]} if stored == 3 else {}
    known: dict[str, twins.Weight] = dict(weights)
    given = {}
    for name in ("down", "qkv", "out"):  # `up` is a float product everywhere
        shape = weights[f"layers.{name}.weight"].shape
        narrow, scale, step = drawn(*shape), torch.rand(shape[:2]), torch.rand(stored) / 9 + 0.01
        kept = floats.get(name, [])
        others = [i for i in range(stored) if i not in kept]
        known[f"layers.{name}.weight"] = twins.narrow_layers(
            narrow.view(torch.int8)[others].view(E4M3),
            scale[others] / 400,
            step,
            weights[f"layers.{name}.weight"][kept],
            kept,
        )
        given[f"layers.{name}.narrow"] = twins.prepare_narrow(narrow)
        given[f"layers.{name}.input_scale"] = step
        given[f"layers.{name}.narrow_scale"] = scale / 400 * step[:, None]
    words = ";".join(f"{name}:{','.join(map(str, kept))}" for name, kept in floats.items())
    text = spec.text([*given, *weights]) + (f" floats={words}" if words else "")
    batch = (
        torch.randint(0, 30, (9,)), torch.zeros(9).int(), None, torch.tensor([0, 2, 9]).int(), 7,
    )  # fmt: skip
    found = twins.encode(*batch, [*given.values(), *weights.values()], text)
    wanted = twins.encode(*batch, list(known.values()), spec.text(known))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        found, twins.encode(*batch, list(weights.values()), spec.text(weights)), atol=0.01
    )
