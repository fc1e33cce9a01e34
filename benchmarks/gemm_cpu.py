"""The CPU encoder and its GEMMs beside torch's own GEMMs, interleaved in one process.

For each precision: `linear` on prepared weights and `F.linear` on the same shapes, and the whole
`encoder` against the sum of the four `F.linear` of every layer ("GEMMs alone"). int8 means weights
per channel beside float32 parameters; it stands against `F.linear` in float32. All precisions take
turns in one process, so their times compare; on a machine that others use, `--best` reports each
one's best round instead of its median. `--json` adds the provenance. FT_HANDLER_CPU_ISA picks the
instruction set.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ft_handler

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}


def cpu_name() -> str:
    """The processor's name as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def ragged(batch: int, longest: int) -> np.ndarray:
    """Lengths uniform in [0.2, 1] x longest, the first one the longest."""
    lengths = np.random.default_rng(0).integers(int(0.2 * longest), longest + 1, size=batch)
    lengths[0] = longest
    return lengths


def prepared(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """`[L,N,K]` as the ops want it, quantised per channel for int8."""
    ops = torch.ops.fastertransformer
    if precision != "int8":
        return ops.prepare_weight(weight)
    scale = weight.abs().amax(-1) / 127
    quantized = (weight / scale[..., None]).round().to(torch.int8)
    return ops.prepare_layers(quantized, scale, weight.new_empty(0), [])


def systems_of(
    precision: str, lengths: np.ndarray, hidden: int, heads: int, inner: int, layers: int
) -> dict[str, Callable[[], object]]:
    """What is timed: `encoder`, `gemms`, and `linear n x k` beside `F.linear n x k`."""
    ops = torch.ops.fastertransformer
    dtype = DTYPES[precision]
    tokens, longest = int(lengths.sum()), int(lengths.max())

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.02).to(dtype)

    shapes = [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]
    weights = [draw(layers, n, k) for n, k in shapes]
    packed = [prepared(w, precision) for w in weights]
    inputs = [draw(tokens, k) for _, k in shapes]
    biases = [draw(layers, n) for n, _ in shapes]
    ones, zeros = draw(layers, hidden) + 1, draw(layers, hidden)
    ids = torch.randint(0, 1000, (tokens,))
    types = torch.zeros_like(ids)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tables = draw(1000, hidden), draw(longest, hidden), draw(2, hidden)

    def encoder() -> torch.Tensor:
        (wq, wo, wu, wd), (bq, bo, bu, bd) = packed, biases
        return ops.encoder(
            *(ids, types, None, cu_seqlens, longest, *tables, ones[0], zeros[0]),
            *(wq, bq, wo, bo, ones, zeros, wu, bu, wd, bd, ones, zeros, heads, 1e-12),
        )

    def gemms() -> None:
        for layer in range(layers):
            for x, w in zip(inputs, weights, strict=True):
                F.linear(x, w[layer])

    found: dict[str, Callable[[], object]] = {"encoder": encoder, "gemms": gemms}
    for (n, k), x, w in zip(shapes, inputs, weights, strict=True):
        one = prepared(w[:1], precision)
        found[f"linear {n}x{k}"] = lambda x=x, one=one: ops.linear(x, one, None, None)
        found[f"F.linear {n}x{k}"] = lambda x=x, w=w: F.linear(x, w[0])
    return found


def timed(
    systems: dict[str, Callable[[], object]], reps: int, best: bool = False
) -> dict[str, float]:
    """Median (or best) milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for rep in range(reps + 1):
        for name, run in systems.items():
            begin = time.perf_counter()
            run()
            if rep:  # the first round warms up
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: float(np.min(t) if best else np.median(t)) for name, t in times.items()}


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument(
        "--model", default="768,12,3072,12", help="hidden,heads,intermediate,layers"
    )
    parser.add_argument("--dtypes", default="fp32,bf16,int8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    ft_handler.load_library()
    hidden, heads, inner, layers = (int(x) for x in args.model.split(","))
    lengths = ragged(args.batch, args.longest)
    build = json.loads(torch.ops.fastertransformer.build_info())
    report = {
        "cpu": cpu_name(),
        "isa": build["cpu_isa"],
        "threads": args.threads,
        "torch": torch.__version__,
        "version": build["version"],
        "model": args.model,
        "tokens": int(lengths.sum()),
        "padded": args.batch * args.longest,
        "milliseconds": {},
    }
    print(*(f"{k}={v}" for k, v in report.items() if k != "milliseconds"), sep="  ")
    names = args.dtypes.split(",")
    with torch.inference_mode():
        systems = {
            f"{name} {key}": run
            for name in names
            for key, run in systems_of(name, lengths, hidden, heads, inner, layers).items()
        }
        times = timed(systems, args.reps, args.best)
    for name in names:
        ms = {k.split(" ", 1)[1]: t for k, t in times.items() if k.startswith(f"{name} ")}
        report["milliseconds"][name] = ms
        print(f"{name} encoder {ms['encoder']:.1f}  GEMMs alone {ms['gemms']:.1f}", end="  ")
        print(f"ratio {ms['encoder'] / ms['gemms']:.3f}", end="")
        for key in ms:
            if key.startswith("linear"):
                print(f"  {key} {ms[key]:.2f} ({ms[key] / ms['F.' + key]:.3f})", end="")
        print()
    first = names[0]
    for name in names[1:]:
        ratios = {k: t / times[f"{first} {k}"] for k, t in report["milliseconds"][name].items()}
        own = [k for k in ratios if k == "encoder" or k.startswith("linear")]
        print(f"{name} / {first}:", *(f"{k} {ratios[k]:.3f}" for k in own), sep="  ")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
