"""Builds of the library side by side: the same encoders, each build in a process of its own.

    python benchmarks/cuda/libraries.py before=old.so after=new.so [--rows "base ragged" ...]
        [--types float16 float8_e4m3fn] [--device cuda|cpu] [--out x.json]

The encoders have random weights and the lengths of the rows of benchmarks/encoder.py; on a GPU they
run in CUDA graphs. The processes take turns, so that a drift of clocks hits all builds; figures are
medians, in milliseconds, and their ratio to the first build's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ft_handler import load_library
from ft_handler.native.library import LIBRARY_VARIABLE
from ft_handler.tuning import table
from ft_handler.tuning.measure import VOCABULARY, random_encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoder import Run, cuda_times, graphed, workloads
from gemm import SIZES
from provenance import provenance


def times(run: Run, iterations: int, device: str) -> list[float]:
    """Milliseconds of each call."""
    if device == "cuda":
        return cuda_times({"": run}, 1, iterations)[""]
    found = []
    for _ in range(iterations):
        start = time.perf_counter()
        run()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def answer(arguments: argparse.Namespace) -> None:
    """A build's process: the median of the run that each line of standard input names."""
    load_library()
    if arguments.device == "cuda":
        table.load_table()  # as the handler does
    encoders: dict[tuple[str, str], Any] = {}
    runs = []
    for _, size, lengths in workloads(arguments.rows):
        total, longest = int(lengths.sum()), int(lengths.max())
        ids = torch.randint(VOCABULARY, (total,), device=arguments.device)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=arguments.device)
        for dtype in arguments.types:
            if (size, dtype) not in encoders:
                layers, hidden, inner, heads = SIZES[size]
                encoders[size, dtype] = random_encoder(
                    hidden, inner, heads, layers, dtype, arguments.device
                )
                # A tuner's encoder, which never takes the kernels for few tokens: as others do.
                encoders[size, dtype].configure("")

            def run(
                encoder: Any = encoders[size, dtype],
                inputs: tuple[Any, ...] = (ids, ids % 2, None, cu_seqlens, longest),
            ) -> object:
                return encoder(*inputs)

            runs.append(graphed(run) if arguments.device == "cuda" else run)
    print("ready", flush=True)
    for line in sys.stdin:
        taken = times(runs[int(line)], arguments.iterations, arguments.device)
        print(statistics.median(taken), flush=True)


def started(library: str, given: list[str]) -> subprocess.Popen[str]:
    """The process of a build, ready to be asked."""
    environment = {**os.environ, LIBRARY_VARIABLE: str(Path(library).resolve())}
    process = subprocess.Popen(
        [sys.executable, __file__, *given, "--answer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"error: {library} could not be measured")
    return process


def asked(process: subprocess.Popen[str], index: int) -> float:
    assert process.stdin
    assert process.stdout
    print(index, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("builds", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--types", nargs="*", default=["float16", table.NARROW])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every build")
    parser.add_argument("--iterations", type=int, default=12, help="a turn")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer(arguments)
        return
    builds = dict(build.split("=", 1) for build in arguments.builds)
    processes = {name: started(library, sys.argv[1:]) for name, library in builds.items()}
    names = [
        (row, int(n.sum()), t) for row, _, n in workloads(arguments.rows) for t in arguments.types
    ]
    rows: list[dict[str, Any]] = []
    for index, (name, tokens, dtype) in enumerate(names):
        turns: dict[str, list[float]] = {build: [] for build in builds}
        for _ in range(arguments.rounds):
            for build, process in processes.items():
                turns[build].append(asked(process, index))
        ms = {build: statistics.median(found) for build, found in turns.items()}
        first = next(iter(ms.values()))
        rows.append({"workload": name, "tokens": tokens, "type": dtype, "ms": ms})
        told = "  ".join(f"{build} {one:.3f} ({one / first:.3f})" for build, one in ms.items())
        print(f"{name} {dtype} T={tokens} | {told}", flush=True)
    for process in processes.values():
        process.communicate()
    if arguments.out:
        record = {"provenance": provenance(), "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
