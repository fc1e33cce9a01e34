"""Merge or split: the time of one batch under different bucket plans, on real length distributions.

    python benchmarks/buckets.py --model DIR [--device cuda] [--batch 32] [--rounds 7]

DIR is what `ft-handler trace` wrote. Lengths come from FT_HANDLER_SHARED, else from a bell curve.
The plans are interleaved in every round, on the same batch; what counts is the ratio to one bucket.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ft_handler import load_model
from ft_handler.engine.base import Engine
from ft_handler.engine.select import engine_for
from ft_handler.request.batching import flatten, pack, plan_buckets
from ft_handler.types import Encoding, Item

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance

SHARED = Path(os.environ.get("FT_HANDLER_SHARED") or Path(__file__).resolve().parents[2] / "shared")
SETS = {"SST-2": "sst2_dev", "MRPC": "mrpc_test", "AG News": "agnews_test",
        "SQuAD 384": "squad_dev_384"}  # fmt: skip
COARSE = (64, 128, 256, 512)
FINE = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

#: Name -> (edges, token budget).
PLANS: dict[str, tuple[tuple[int, ...], int]] = {
    "one bucket": ((), 1 << 30),
    "edges 64 128 256 512": (COARSE, 1 << 30),
    "edges 16 32 48 64 96 128 192 256 384 512": (FINE, 1 << 30),
    "budget 512": ((), 512),
    "budget 1024": ((), 1024),
    "budget 2048": ((), 2048),
    "budget 4096": ((), 4096),
    "budget 8192": ((), 8192),
}


def lengths_of(name: str, count: int, rng: random.Random, most: int) -> list[int]:
    """A batch of lengths drawn from one of the sets."""
    path = SHARED / "data/lengths" / f"{SETS[name]}.txt"
    if path.is_file():
        values = [int(line) for line in path.read_text().split()]
    else:
        mean = {"SST-2": 25, "MRPC": 53, "AG News": 53, "SQuAD 384": 175}[name]
        values = [max(4, int(rng.gauss(mean, mean / 2.5))) for _ in range(2000)]
    return [min(rng.choice(values), most) for _ in range(count)]


def seconds(
    engine: Engine,
    lengths: list[int],
    plan: tuple[tuple[int, ...], int],
    clock: Callable[[], float],
) -> float:
    """One batch from tokens to logits: plan, pack, launch every bucket, collect."""
    rng = np.random.default_rng(0)
    encodings = [
        Encoding(Item(i, 0, None), [rng.integers(1, 1000, n)], [n], False)
        for i, n in enumerate(lengths)
    ]
    start = clock()
    sequences = flatten(encodings)
    buckets = plan_buckets(sequences.lengths, *plan)
    pending = [engine.launch(pack(sequences, members)) for members in buckets]
    for one in pending:
        one.result()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts this process's processor time: for one thread on a machine others use",
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args.model / "traced_model.pt", device)
    engine = engine_for(model, device)
    engine.warm_up()
    rng = random.Random(0)
    rows = []
    for name in SETS:
        for count in args.batch:
            times: dict[str, list[float]] = {plan: [] for plan in PLANS}
            tokens = []
            for _ in range(args.rounds):
                lengths = lengths_of(name, count, rng, model.info.max_positions)
                tokens.append(sum(lengths))
                order = list(PLANS)
                rng.shuffle(order)
                for plan in order:
                    times[plan].append(seconds(engine, lengths, PLANS[plan], clock))
            base = times["one bucket"]
            ratios = {
                plan: round(statistics.median(t / b for t, b in zip(ts, base, strict=True)), 3)
                for plan, ts in times.items()
            }
            best = {plan: round(min(ts) * 1e3, 2) for plan, ts in times.items()}
            rows.append(
                {"set": name, "batch": count, "tokens": round(statistics.mean(tokens)),
                 "ratio_to_one_bucket": ratios, "best_ms": best}
            )  # fmt: skip
            print(f"{name}, batch {count}, {rows[-1]['tokens']} tokens")
            for plan in PLANS:
                print(f"  {plan:<42}{ratios[plan]:>7.3f}x{best[plan]:>10.2f} ms")
    if args.output:
        shape = f"{model.info.num_layers} layers of {model.info.hidden_size}"
        head = provenance(
            model=f"{shape}, {model.info.data_type}",
            device=args.device,
            threads=torch.get_num_threads(),
            clock=args.clock,
        )
        args.output.write_text(json.dumps({"provenance": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
