"""The encoder in fp16 and in FP8 on small awkward batches on an sm_90 GPU, for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/cuda/encoder_check.py

Random weights, three sizes, batches from one token to what the large kernels take; each result is
held against transformers' in fp32 on the processor. Exits with 1 where one is too far away.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from ft_handler import load_library

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoder import Batch, Shape, hf_model, hf_run, our_encoder

# Layers, hidden, intermediate, heads: a width of one vector a thread, one of several, and one that
# does not divide by the tiles.
SHAPES: tuple[Shape, ...] = ((2, 256, 1024, 4), (2, 768, 3072, 12), (1, 320, 1280, 5))
LENGTHS = ((1,), (17, 15), (113, 60, 1), (300, 129, 384, 7))
# Of the difference's length to the result's; a simulation of FP8 in fp32 has up to 0.17.
BOUNDS = {"fp16": 4e-3, "fp8": 0.25}


def on_gpu(batch: Batch) -> Batch:
    """The same batch with its packed tensors there; what is padded stays."""
    for name in ("packed_ids", "types", "cu_seqlens"):
        setattr(batch, name, getattr(batch, name).cuda())
    return batch


def main() -> int:
    torch.manual_seed(0)
    load_library()
    # Memory begins as NaN: what is read before it is written shows in the results. initcheck, which
    # does not see what bulk copies write, takes it for written.
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = 0
    with torch.no_grad():
        for shape in SHAPES:
            model = hf_model("bert", shape, 512)
            for part in model.modules():  # so that what is computed outweighs what it is added to
                if isinstance(part, torch.nn.Linear):
                    part.weight.mul_(4)
            for precision, bound in BOUNDS.items():
                engine = our_encoder(model.cuda(), precision)
                model.cpu()
                for lengths in LENGTHS:
                    batch = Batch(np.array(lengths), "cpu")
                    exact = hf_run(model, batch)()[batch.mask.bool()]
                    apart = engine(on_gpu(batch))().float().cpu() - exact
                    error = float(apart.norm() / exact.norm())
                    right = error <= bound  # not a NaN either
                    wrong += not right
                    verdict = "" if right else ": WRONG"
                    print(f"{precision} {shape} {lengths} {error:.1e}{verdict}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
