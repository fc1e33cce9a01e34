"""The traced file held against transformers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ft_handler.model import bundle
from ft_handler.model.info import DATA_TYPES, QUESTION_ANSWERING, ModelInfo
from ft_handler.prepare import hf
from ft_handler.prepare.options import TraceOptions

FP32_TOLERANCE = 1e-4
# Half precision may be off by as much again as transformers itself is, plus rounding noise.
HALF_FACTOR, HALF_FLOOR = 2.0, 2e-3


class _PlainHead(nn.Module):
    """transformers' model behind the contract's forward: positional tensors in, fp32 tuple out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        out = self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            return_dict=False,
        )
        return tuple(part.float() for part in out)


def sample_batch(
    options: TraceOptions, vocab_size: int, type_vocab_size: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random padded ids, mask and types of ragged lengths: three `[batch_size, longest]` int64."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch_size, longest)
    lengths = torch.randint(2, longest + 1, (options.batch_size,), generator=generator)
    lengths[0] = longest
    columns = torch.arange(longest)
    mask = (columns < lengths[:, None]).long()
    ids = torch.randint(0, vocab_size, shape, generator=generator) * mask
    types = (columns >= lengths[:, None] // 2).long() * mask if type_vocab_size > 1 else ids * 0
    return ids, mask, types


def trace_plain(
    inner: nn.Module, dtype: torch.dtype, samples: tuple[Tensor, Tensor, Tensor]
) -> torch.jit.ScriptModule:
    """transformers' own model through `torch.jit.trace`, pads and all."""
    plain = copy.deepcopy(inner).to(dtype).eval()
    with torch.no_grad(), hf.quiet_transformers(), warnings.catch_warnings():
        # What tracing may have frozen is checked afterwards, at another shape.
        warnings.simplefilter("ignore")
        # The eager attention keeps batch and length symbolic in a trace.
        plain.set_attn_implementation("eager")  # type: ignore[operator]
        traced: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
            _PlainHead(plain).eval(), samples, check_trace=False, strict=False
        )
    return traced


def compare(
    path: Path, reference: nn.Module, info: ModelInfo, samples: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float]:
    """Largest logit difference of the file from transformers in fp32, and what is allowed.

    In fp32 that is 1e-4 of the largest logit (at least of 1); in half precision twice the
    difference that transformers itself shows in that type. A second shape shows whether the
    first one froze into the file.
    """
    half = samples[0].shape[1] // 2
    other = tuple(part[:1, :half] for part in samples)
    traced = bundle.load_model(path).module
    dtype = DATA_TYPES[info.data_type]
    low = copy.deepcopy(reference).to(dtype) if dtype != torch.float32 else None
    difference, own, scale = 0.0, 0.0, 1.0
    with torch.inference_mode():
        for ids, mask, types in (samples, other):
            kept = mask.bool() if info.mode == QUESTION_ANSWERING else slice(None)
            wanted = _logits(reference, ids, mask, types)
            scale = max(scale, *(float(w[kept].abs().max()) for w in wanted))
            difference = max(difference, _apart(list(traced(ids, mask, types)), wanted, kept))
            if low is not None:
                own = max(own, _apart(_logits(low, ids, mask, types), wanted, kept))
    if low is None:
        return difference, FP32_TOLERANCE * scale
    return difference, HALF_FACTOR * own + HALF_FLOOR * scale


def _logits(inner: nn.Module, ids: Tensor, mask: Tensor, types: Tensor) -> list[Tensor]:
    out = inner(input_ids=ids, attention_mask=mask, token_type_ids=types, return_dict=False)
    return [part.float() for part in out]


def _apart(found: list[Tensor], wanted: list[Tensor], kept: Tensor | slice) -> float:
    """Largest difference over kept tokens; infinite when anything is not a number."""
    apart = [(a - b)[kept].abs() for a, b in zip(found, wanted, strict=True)]
    return max(float(d.nan_to_num(nan=float("inf")).max()) for d in apart)
