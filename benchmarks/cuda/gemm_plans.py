"""Times every GEMM plan over many shapes: what scripts/gemm_costs.py fits a card's costs to.

    sh benchmarks/cuda/build_gemm_variants.sh gemm_variants
    python benchmarks/cuda/gemm_plans.py gemm_variants --out h100-gemm-plans.json

The four layers of encoders of 384, 768 and 1,024 columns, in fp16 and with operands in e4m3, three
quarters of a minute. A row of the result is a shape. `fp8`: of e4m3 operands; `ours`: a plan, its
microseconds a layer with the layer norm or activation that belongs to it, its tile, and the amounts
of TileCost and AfterCost (csrc/kernels/cuda/gemm_sm90.h); in fp16 besides, `library`: the same of
cuBLASLt's first guess; `best_library`: the fastest of its eight algorithms. With --stacks, which
needs a built library, `fp8_stacks` holds microseconds of a whole layer by the plan of one product.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))
from provenance import provenance

EVERY = [128, 256, 384, 624, 1024, 1344, 2112, 4096, 6272, 15104]
BETWEEN = [192, 320, 512, 768, 896, 1152, 1600, 2560, 3072, 4992, 8192, 10240, 61440]
ROWS = {384: EVERY, 768: sorted(EVERY + BETWEEN), 1024: sorted(EVERY + BETWEEN)}


STACKED = {
    768: [256, 512, 1024, 2048, 4096, 4864, 10240, 15872],
    1024: [512, 1024, 4096, 11264, 44032],
}
#: What operands are -> the program's mode.
OPERANDS = {"half": "measure", "fp8": "measure_fp8"}


def library() -> str:
    """The cuBLASLt that torch brings, as the process has it mapped."""
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    maps = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in maps if "libcublasLt.so" in line)


def measured(program: Path, operands: str, hidden: int, rows: list[int]) -> list[dict[str, Any]]:
    """The four layers of an encoder at each number of tokens."""
    environment = {**os.environ, "FT_HANDLER_CUBLASLT": library()}
    command = [str(program.resolve()), OPERANDS[operands], str(hidden), *map(str, rows)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{program.name} failed: {done.stdout[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def stacks(hidden: int, counts: list[int]) -> list[dict[str, Any]]:
    """The four products in stacks of layers in FP8, as `ft-handler tune` compares plans."""
    from ft_handler.tuning.measure import Layer, measure
    from ft_handler.tuning.table import NARROW

    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for rows in counts:

        def tell(layer: Layer, us: dict[str, float], rows: int = rows) -> None:
            named = {plan.removeprefix("sm90:"): round(time, 2) for plan, time in us.items()}
            # The first time around there are all plans, then the best alone.
            found.setdefault((rows, layer.n, layer.k), named)

        measure(hidden, 4 * hidden, hidden // 64, rows, NARROW, tell=tell)
    return [{"rows": r, "n": n, "k": k, "us": us} for (r, n, k), us in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path, help="gemm_variants")
    parser.add_argument("--rows", type=int, nargs="*", help="token counts, of every width")
    parser.add_argument("--operands", nargs="*", choices=OPERANDS, default=list(OPERANDS))
    parser.add_argument("--stacks", action="store_true", help="products in FP8 in stacks too")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # The first second on an idle GPU is slower: two row counts more, not kept.
    measured(arguments.program, arguments.operands[0], 768, [15104, 61440])
    rows = []
    for operands in arguments.operands:
        for hidden, counts in ROWS.items():
            rows += measured(arguments.program, operands, hidden, arguments.rows or counts)
    chains = []
    if arguments.stacks:
        for hidden, counts in STACKED.items():
            chains += stacks(hidden, counts)
    origin = provenance(multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count)
    arguments.out.write_text(
        f'{{"provenance": {json.dumps(origin)},\n"rows": [\n'
        + ",\n".join(json.dumps(row) for row in rows)
        + '\n],\n"fp8_stacks": [\n'
        + ",\n".join(json.dumps(chain) for chain in chains)
        + "\n]}\n"
    )


if __name__ == "__main__":
    main()
