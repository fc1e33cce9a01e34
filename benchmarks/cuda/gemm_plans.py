"""Times every GEMM plan over many shapes: what scripts/gemm_costs.py fits a card's costs to.

    sh benchmarks/cuda/build_gemm_variants.sh gemm_variants
    python benchmarks/cuda/gemm_plans.py gemm_variants --out h100-gemm-plans.json

The four layers of encoders of 384, 768 and 1,024 columns, fp16, half a minute. A row of the result
is a shape. `ours`: a plan, its microseconds a layer with the layer norm or activation that belongs
to it, its tile, and the amounts of TileCost and AfterCost (csrc/kernels/cuda/gemm_sm90.h);
`library`: the same of cuBLASLt's first guess; `best_library`: the fastest of its eight algorithms.
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
from provenance import provenance

EVERY = [128, 256, 384, 624, 1024, 1344, 2112, 4096, 6272, 15104]
BETWEEN = [192, 320, 512, 768, 896, 1152, 1600, 2560, 3072, 4992, 8192, 10240, 61440]
ROWS = {384: EVERY, 768: sorted(EVERY + BETWEEN), 1024: sorted(EVERY + BETWEEN)}


def library() -> str:
    """The cuBLASLt that torch brings, as the process has it mapped."""
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    maps = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in maps if "libcublasLt.so" in line)


def measured(program: Path, hidden: int, rows: list[int]) -> list[dict[str, Any]]:
    """The four layers of an encoder at each number of tokens."""
    environment = {**os.environ, "FT_HANDLER_CUBLASLT": library()}
    command = [str(program.resolve()), "measure", str(hidden), *map(str, rows)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{program.name} failed: {done.stdout[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path, help="gemm_variants")
    parser.add_argument("--rows", type=int, nargs="*", help="token counts, of every width")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # The first second on an idle GPU is slower: two row counts more, not kept.
    measured(arguments.program, 768, [15104, 61440])
    rows = []
    for hidden, counts in ROWS.items():
        rows += measured(arguments.program, hidden, arguments.rows or counts)
    origin = provenance(multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count)
    arguments.out.write_text(
        f'{{"provenance": {json.dumps(origin)},\n"rows": [\n'
        + ",\n".join(json.dumps(row) for row in rows)
        + "\n]}\n"
    )


if __name__ == "__main__":
    main()
