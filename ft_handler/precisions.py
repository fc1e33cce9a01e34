"""What the encoder is stored and computed in: one row a precision.

A row says how weights become what the traced file holds, how far the file's logits may be from
transformers' in fp32, and which devices serve it. Heads are kept and computed in fp32 whatever the
row says. Where products are quantised the row's type is that of everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ft_handler.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """That products are rounded to 8 bits, and what that may cost before some of them are kept.

    torch_name      torch's name of what a weight is rounded to, such as "int8". Inputs are rounded
                    to whole numbers by what they are; to floats with one scale a product and layer
    kept            the precision of products that are kept
    projection      whether the product between the embeddings and the layers is one of them
    texts, random   the root mean square of the outputs' differences from fp32 on calibration texts,
                    and on random tokens, as a part of that of the outputs themselves
    """

    torch_name: str
    kept: str
    projection: bool
    texts: float
    random: float

    @property
    def dtype(self) -> torch.dtype:
        """torch's type of a rounded weight."""
        return _torch_type(self.torch_name)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One precision.

    name          the traced file's `data_type`, and what `--data_type` takes
    torch_name    torch's name of the type, such as "bfloat16"
    own_error     how many times transformers' own error in this type is allowed, of quantised
                  products that of a float simulation; 0 where the type is the reference's
    logit_error   what is allowed on top, as a part of the largest logit (at least of 1)
    devices       types of devices that serve it
    quantized     of quantised products; None where products are of the type as well
    op_interface  the least interface of the library's ops that it needs
    """

    name: str
    torch_name: str
    own_error: float
    logit_error: float
    devices: tuple[str, ...] = ("cpu", "cuda")
    quantized: Quantized | None = None
    op_interface: int = 2

    @property
    def dtype(self) -> torch.dtype:
        """torch's type."""
        return _torch_type(self.torch_name)

    @property
    def product_dtype(self) -> torch.dtype:
        """torch's type of the layers' products."""
        return self.dtype if self.quantized is None else self.quantized.dtype

    def stored(self, weight: Tensor) -> Tensor:
        """A weight of the encoder as the file holds it: of the same shape, contiguous."""
        return weight.detach().to(self.dtype).contiguous()

    def allowed(self, largest_logit: float, own: float) -> float:
        """The largest difference from transformers in fp32 that a sound file may show.

        own  the difference that transformers itself shows in this type on the same inputs, or a
             simulation of quantised products
        """
        return self.own_error * own + self.logit_error * max(largest_logit, 1.0)


def _torch_type(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


_rows: dict[str, Precision] = {}


def register(precision: Precision) -> None:
    """Make a precision known; one of the same name is replaced."""
    _rows[precision.name] = precision


def names() -> tuple[str, ...]:
    """Every precision's name, the reference's first."""
    return tuple(_rows)


def quantized_names() -> tuple[str, ...]:
    """The precisions whose products are rounded to 8 bits."""
    return tuple(name for name, row in _rows.items() if row.quantized is not None)


def get(name: str) -> Precision:
    """The row of a `data_type`; raises ModelError naming those there are."""
    try:
        return _rows[name]
    except KeyError:
        raise ModelError(f"data_type {name!r} is not one of {', '.join(_rows)}") from None


register(Precision(name="fp32", torch_name="float32", own_error=0.0, logit_error=1e-4))
# Half precision may be off by twice what transformers itself is, plus rounding noise.
register(Precision(name="fp16", torch_name="float16", own_error=2.0, logit_error=2e-3))
register(Precision(name="bf16", torch_name="bfloat16", own_error=2.0, logit_error=2e-3))
# Random tokens leave a trained classifier undecided, so that its outputs are small beside their
# errors: the example classifier shows 0.18 on those and 0.03 on its own texts.
register(
    Precision(
        name="int8",
        torch_name="float16",
        own_error=2.0,
        logit_error=2e-3,
        quantized=Quantized(
            torch_name="int8", kept="bf16", projection=True, texts=0.06, random=0.3
        ),
        op_interface=4,
    )
)
register(
    Precision(
        name="fp8",
        torch_name="float16",
        own_error=2.0,
        logit_error=2e-3,
        quantized=Quantized(
            torch_name="float8_e4m3fn", kept="fp16", projection=False, texts=0.06, random=0.3
        ),
        op_interface=5,
    )
)
