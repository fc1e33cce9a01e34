"""The traced file held against transformers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ft_handler.errors import ModelError
from ft_handler.model import bundle
from ft_handler.precisions import Precision, get
from ft_handler.prepare import hf
from ft_handler.prepare.options import TraceOptions

Samples = tuple[Tensor, Tensor, Tensor]
Expected = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]
Answer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Reference(nn.Module):
    """transformers' model behind the traced file's call: positional tensors in, fp32 tuple out.

    expected  as in `Head`
    """

    def __init__(
        self, inner: Any, takes_token_types: bool, expected: Expected | None = None
    ) -> None:
        super().__init__()
        self.inner = inner
        self.expected = expected
        self.takes_token_types = takes_token_types

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """Padded `[B,S]` -> what transformers answers, or what is expected of that."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_token_types:
            inputs["token_type_ids"] = token_type_ids
        outputs = tuple(part.float() for part in self.inner(**inputs, return_dict=False))
        return outputs if self.expected is None else self.expected(outputs, attention_mask)

    def to_type(self, dtype: torch.dtype) -> Reference:
        """A copy that computes in `dtype`."""
        return copy.deepcopy(self).to(dtype).eval()


def sample_batch(
    options: TraceOptions, vocab_size: int, token_types: int, pad: int | None, longest: int
) -> Samples:
    """Random padded ids, mask and types of ragged lengths: three `[batch_size, longest]` int64.

    pad  the id of the pad, if the vocabulary has one
    """
    filler = pad if pad is not None and 0 <= pad < vocab_size else 0
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch_size, longest)
    lengths = torch.randint(2, longest + 1, (options.batch_size,), generator=generator)
    lengths[0] = longest
    columns = torch.arange(longest)
    mask = (columns < lengths[:, None]).long()
    # Some models count positions by which ids are not the pad's, so it stands at the end alone.
    ids = torch.randint(0, vocab_size - 1, shape, generator=generator)
    ids = torch.where(mask.bool(), ids + (ids >= filler), filler)
    types = (columns >= lengths[:, None] // 2).long() * mask
    return ids, mask, types if token_types > 1 else torch.zeros_like(types)


def trace_plain(
    reference: Reference, dtype: torch.dtype, samples: Samples
) -> torch.jit.ScriptModule:
    """transformers' own model through `torch.jit.trace`, pads and all."""
    plain = reference.to_type(dtype)
    script = cast("Callable[..., torch.jit.ScriptModule]", torch.jit.trace)
    with torch.no_grad(), hf.quiet_transformers(), warnings.catch_warnings():
        # What tracing may have frozen is checked afterwards, at another shape.
        warnings.simplefilter("ignore")
        # The eager attention keeps batch and length symbolic in a trace.
        plain.inner.set_attn_implementation("eager")
        return script(plain, samples, check_trace=False, strict=False)


def compare(
    path: Path,
    reference: Reference,
    precision: Precision,
    per_token: bool,
    samples: Samples,
    simulated: Answer | None = None,
    typical: float = 0.0,
) -> tuple[float, float]:
    """Largest logit difference of the file from transformers in fp32, and what is allowed.

    What is allowed is the precision's to say; of quantised products by what a simulation loses on
    the same inputs. Where outputs are few that may by chance be next to nothing, so it counts as
    at least twice the `typical` difference, the root mean square over many inputs. Of outputs a
    token, those of pads do not count. A second shape shows whether the first one froze into the
    file. Raises ModelError where outputs are not finite: nothing can be compared with those, or
    answered.
    """
    half = samples[0].shape[1] // 2
    other = (samples[0][:1, :half], samples[1][:1, :half], samples[2][:1, :half])
    traced = bundle.load_model(path).module
    low = simulated
    if low is None and precision.own_error:
        low = reference.to_type(precision.dtype)
    difference = largest = 0.0
    own = 2 * typical
    with torch.inference_mode():
        for batch in (samples, other):
            kept = batch[1].bool() if per_token else slice(None)
            wanted, found = reference(*batch), traced(*batch)
            if not _finite(wanted, kept):
                raise ModelError("transformers' own outputs for random tokens are not finite")
            theirs = wanted if low is None else low(*batch)
            # Where transformers overflows, another device's kernels may, whatever these do.
            if not _finite(found, kept) or not _finite(theirs, kept):
                raise ModelError(
                    f"the outputs overflow in {precision.name}: take another --data_type"
                )
            largest = max(largest, *(float(w[kept].abs().max()) for w in wanted))
            difference = max(difference, _apart(found, wanted, kept))
            own = max(own, _apart(theirs, wanted, kept))
    return difference, precision.allowed(largest, own)


def hold_exact(answer: Answer, reference: Reference, per_token: bool, samples: Samples) -> None:
    """Refuse what in fp32 is not transformers' model; raises ModelError.

    What is measured by a simulation needs one of the right model.
    """
    kept = samples[1].bool() if per_token else slice(None)
    with torch.inference_mode():
        wanted, found = reference(*samples), answer(*samples)
    if not _finite(wanted, kept):
        raise ModelError("transformers' own outputs for random tokens are not finite")
    largest = max(float(w[kept].abs().max()) for w in wanted)
    difference, allowed = _apart(found, wanted, kept), get("fp32").allowed(largest, 0.0)
    if not difference <= allowed:
        raise ModelError(
            f"the fused model's logits differ from transformers' by {difference:.2e} in fp32, more "
            f"than the {allowed:.2e} that is allowed"
        )


def stays_finite(
    reference: Reference, dtype: torch.dtype, per_token: bool, samples: Samples
) -> bool:
    """Whether transformers' model stays finite in a type."""
    with torch.inference_mode():
        kept = samples[1].bool() if per_token else slice(None)
        return _finite(reference.to_type(dtype)(*samples), kept)


def _apart(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], kept: Tensor | slice) -> float:
    """Largest difference over kept outputs."""
    return max(float((a - b)[kept].abs().max()) for a, b in zip(found, wanted, strict=True))


def _finite(outputs: tuple[Tensor, ...], kept: Tensor | slice) -> bool:
    return all(bool(torch.isfinite(part[kept]).all()) for part in outputs)
