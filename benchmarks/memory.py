"""Resident memory of a worker: a process of its own that loads a traced model and answers.

    python benchmarks/memory.py                                    # BERT-base, every precision
    python benchmarks/memory.py --model minilm --precision fp32 int8

A row is one process, in MiB: `without` is what Python, torch and this package take before the
model, `loaded` after loading and warming up, `answered` after 32 texts of SST-2's lengths in one
batch, `peak` the most resident until then. `unique` is what ends with the process: resident memory
less what other processes share. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance
from serving import HERE, MODELS, make_bodies, make_checkpoint, trace_ours, vocabulary_folder, words

MIX = "sst2"


def resident() -> dict[str, float]:
    """Resident and unique memory of this process, MiB."""
    found = psutil.Process().memory_full_info()
    return {"rss": found.rss / 2**20, "unique": found.uss / 2**20}


def worker(folder: Path, texts: list[str]) -> dict[str, Any]:
    """What this process takes before a model, with it and after its answers."""
    from ft_handler import load_library
    from ft_handler.predictor import Predictor

    load_library()
    row: dict[str, Any] = {"without": resident()}
    predictor = Predictor.load(folder, device="cpu")
    row["loaded"] = resident()
    predictor.predict(texts)
    row["answered"] = resident()
    # Of this program alone; getrusage's begins with what the parent had.
    status = Path("/proc/self/status").read_text()
    row["peak"] = int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 1024
    return row


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="base")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results/)")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.worker:
        folder, bodies = arguments.worker
        print(json.dumps(worker(folder, bodies.read_text().splitlines())))
        return
    from ft_handler import build_info, load_library

    load_library()
    record = provenance(library=build_info(), model=arguments.model)
    out: Path = arguments.out or HERE / "results" / f"cpu-memory-{record['date'][:10]}.json"
    vocabulary = vocabulary_folder()
    rows = []
    with tempfile.TemporaryDirectory(prefix="ft_bench_") as scratch:
        folder = Path(scratch)
        make_bodies(MIX, words(vocabulary), folder / "texts", 32)
        make_checkpoint(MIX, MODELS[arguments.model], vocabulary, folder / "checkpoint")
        for precision in arguments.precision:
            traced = folder / precision
            trace_ours(MIX, folder / "checkpoint", precision, traced)
            command = [sys.executable, __file__, "--worker", str(traced), str(folder / "texts")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            size = (traced / "traced_model.pt").stat().st_size / 2**20
            rows.append({"precision": precision, "file": size, **json.loads(done.stdout)})
            row = rows[-1]
            figures = [f"{k} {row[k]['rss']:,.0f}" for k in ("without", "loaded", "answered")]
            print(f"{precision:5} file {size:,.0f} {' '.join(figures)} peak {row['peak']:,.0f}")
    out.write_text(json.dumps({"provenance": record, "rows": rows}, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
