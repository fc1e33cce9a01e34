"""Precisions: what a row says, and what asks it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_support import fused, info_of, random_bert

from ft_handler import load_model, precisions
from ft_handler.errors import ModelError
from ft_handler.model.bundle import save_model
from ft_handler.precisions import Precision


@pytest.fixture
def rows() -> Iterator[None]:
    """Restore the rows afterwards."""
    before = dict(precisions._rows)
    yield
    precisions._rows.clear()
    precisions._rows.update(before)


def test_rows_know_their_types() -> None:
    assert precisions.names() == ("fp32", "fp16", "bf16", "int8", "fp8")
    assert precisions.quantized_names() == ("int8", "fp8")
    found = [precisions.get(name).dtype for name in precisions.names()]
    # What is not a product of 8 bits is in half precision.
    half = torch.float16
    assert found == [torch.float32, half, torch.bfloat16, half, half]
    products = [precisions.get(name).product_dtype for name in precisions.names()]
    assert products == [*found[:3], torch.int8, torch.float8_e4m3fn]
    with pytest.raises(ModelError, match="'int3' is not one of fp32, fp16, bf16, int8, fp8"):
        precisions.get("int3")


def test_the_rows_are_readable_without_torch() -> None:
    code = "import sys; from ft_handler import precisions; precisions.get('bf16'); " \
           "sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_allowed() -> None:
    exact, half = precisions.get("fp32"), precisions.get("fp16")
    assert exact.allowed(0.5, own=9.0) == pytest.approx(1e-4)
    assert exact.allowed(20.0, own=0.0) == pytest.approx(2e-3)
    assert half.allowed(3.0, own=0.01) == pytest.approx(2 * 0.01 + 3 * 2e-3)


def test_stored_weights_are_contiguous() -> None:
    stored = precisions.get("bf16").stored(torch.randn(3, 5, requires_grad=True).T)
    assert stored.dtype == torch.bfloat16
    assert stored.shape == (5, 3)
    assert stored.is_contiguous()
    assert not stored.requires_grad


@pytest.mark.usefixtures("rows")
def test_a_device_that_does_not_serve_a_precision(tmp_path: Path) -> None:
    bert = random_bert("sequence_classification")
    path = tmp_path / "traced_model.pt"
    save_model(
        fused(bert, "sequence_classification", "fp16"),
        info_of(bert, "sequence_classification", data_type="fp16"),
        path,
    )
    row = Precision(
        name="fp16", torch_name="float16", own_error=2.0, logit_error=2e-3, devices=("cuda",)
    )
    precisions.register(row)
    with pytest.raises(ModelError, match="is in fp16, which no cpu device serves"):
        load_model(path)
