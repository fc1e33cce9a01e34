"""Encoders with products in int8 on the GPU, where they are computed in fp16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_support import random_weights
from quantized_support import exact_weights, quantized_encoder
from torch import Tensor

from ft_handler import load_library
from ft_handler.model.spec import EncoderSpec
from ft_handler.native import twins

pytestmark = pytest.mark.gpu

KINDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "plain": (192, 3, ()),
    "mixed": (192, 3, ("layers.0.down", "layers.2.down", "layers.1.qkv")),
    "shared": (192, 1, ("layers.0.out",)),
    "projected": (64, 3, ("layers.1.down",)),
    "projection kept": (64, 1, ("embeddings.projection",)),
}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    load_library()


def batch(device: str) -> tuple[Tensor, Tensor, None, Tensor, int]:
    """Packed arguments of `forward`: sequences of 1, 7 and 113 tokens."""
    ids, types = torch.arange(121) % 30, torch.arange(121) % 2
    ends = torch.tensor([0, 1, 8, 121], dtype=torch.int32)
    return ids.to(device), types.to(device), None, ends.to(device), 113


@pytest.mark.parametrize("kind", KINDS)
def test_against_fp32(kind: str) -> None:
    embedding, stored, kept = KINDS[kind]
    spec = EncoderSpec(
        hidden_size=192,
        embedding_size=embedding,
        num_layers=3,
        num_heads=3,
        intermediate_size=768,
        activation="gelu",
        layer_norm_eps=1e-12,
    )
    weights = random_weights(spec, stored=stored)
    wanted = twins.encode(*batch("cpu"), exact_weights(weights), spec.text(weights))
    module: Any = torch.jit.script(quantized_encoder(spec, weights, kept))
    on_cpu = module(*batch("cpu"))
    module = module.cuda()
    found = module(*batch("cuda"))
    assert found.dtype == torch.float16
    cost = (on_cpu.float() - wanted).norm()
    # Weights are those of the file, inputs of products are not rounded.
    assert (found.cpu().float() - wanted).norm() < cost
    before = [tensor.data_ptr() for tensor in module.prepared]
    assert torch.equal(module(*batch("cuda")), found)
    module.release()
    assert torch.equal(module(*batch("cuda")), found)
    assert [tensor.data_ptr() for tensor in module.prepared] == before
