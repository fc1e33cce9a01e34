"""Times the few-token encoder beside cuBLAS's GEMMs alone (CUDA graphs), and checks its error.

Usage: small_bench.py LIBRARY [--tune SECONDS] [--json FILE]; LIBRARY is small_bench.cu and the
kernels' sources, as its head has them, built with -shared -DFT_SMALL_BENCH_LIBRARY.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

BASE, MINI = (12, 768, 3072, 12), (6, 384, 1536, 12)
WORKLOADS: dict[str, tuple[tuple[int, int, int, int], list[int]]] = {
    "base fixed b1 s32": (BASE, [32]),
    "base fixed b1 s64": (BASE, [64]),
    "base fixed b1 s96": (BASE, [96]),
    "base ragged b4 s32": (BASE, [23, 9, 14, 18]),
    "mini fixed b1 s32": (MINI, [32]),
    "mini fixed b1 s64": (MINI, [64]),
}
TILES = [(64, 32), (64, 48), (64, 64), (64, 96), (128, 48), (128, 64)]  # small_layout.h
PLAN = 14  # per GEMM tile, split, stages; then far_ahead, prefetch


class Model:
    """Random weights of one shape, and every way of running them."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        dims: tuple[int, int, int, int],
        lengths: list[int],
        dtype: torch.dtype,
    ) -> None:
        self.lib, self.lengths, self.dtype = lib, lengths, dtype
        layers, h, i, heads = dims
        self.layers, self.h, self.i, self.heads = dims
        g = torch.Generator(device="cuda").manual_seed(1)

        def draw(*shape: int, scale: float, center: float = 0.0) -> torch.Tensor:
            return (torch.randn(*shape, device="cuda", generator=g) * scale + center).to(dtype)

        self.w = [
            draw(layers, 3 * h, h, scale=1.5 * h**-0.5),
            draw(layers, 3 * h, scale=0.1),
            draw(layers, h, h, scale=h**-0.5),
            draw(layers, h, scale=0.1),
            draw(layers, h, scale=0.1, center=1.0),
            draw(layers, h, scale=0.1),
            draw(layers, i, h, scale=h**-0.5),
            draw(layers, i, scale=0.1),
            draw(layers, h, i, scale=i**-0.5),
            draw(layers, h, scale=0.1),
            draw(layers, h, scale=0.1, center=1.0),
            draw(layers, h, scale=0.1),
        ]
        self.tokens = sum(lengths)
        self.x = draw(self.tokens, h, scale=1.0)
        self.cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
        self.shape = (ctypes.c_int * 8)(
            {torch.float16: 1, torch.bfloat16: 2}[dtype],
            self.tokens,
            len(lengths),
            max(lengths),
            h,
            i,
            heads,
            layers,
        )
        self.pointers = (ctypes.c_void_p * 12)(*[t.data_ptr() for t in self.w])
        lib.small_bench_workspace.restype = ctypes.c_size_t
        self.workspace = torch.empty(
            lib.small_bench_workspace(self.shape), dtype=torch.uint8, device="cuda"
        )
        self.hidden = self.x.clone()

    def plan(self) -> list[int] | None:
        out = (ctypes.c_int * PLAN)()
        return list(out) if self.lib.small_bench_plan(self.shape, out) else None

    def _arguments(self, plan: list[int]) -> tuple[Any, ...]:
        return (
            self.shape,
            (ctypes.c_int * PLAN)(*plan),
            self.pointers,
            ctypes.c_float(1e-12),
            ctypes.c_void_p(self.cu.data_ptr()),
            ctypes.c_void_p(self.hidden.data_ptr()),
            ctypes.c_void_p(self.workspace.data_ptr()),
        )

    def ours(self, plan: list[int]) -> torch.Tensor:
        self.hidden.copy_(self.x)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = self.lib.small_bench_run(*self._arguments(plan), stream)
        assert error == 0, f"CUDA error {error} with plan {plan}"
        return self.hidden.clone()

    def time(self, plan: list[int], replays: int = 30) -> float:
        """Median milliseconds of a graph replay; negative when the plan does not fit."""
        self.lib.small_bench_time.restype = ctypes.c_float
        return float(self.lib.small_bench_time(*self._arguments(plan), replays))

    def torch(self, dtype: torch.dtype) -> torch.Tensor:
        """The same encoder in plain torch."""
        x, d = self.x.to(dtype), self.h // self.heads
        for layer in range(self.layers):
            qw, qb, ow, ob, g1, b1, uw, ub, dw, db, g2, b2 = (t[layer].to(dtype) for t in self.w)
            qkv = F.linear(x, qw, qb)
            parts = []
            for piece in qkv.split(self.lengths):
                q, k, v = piece.view(-1, 3, self.heads, d).permute(1, 2, 0, 3)
                parts.append(
                    (torch.softmax(q @ k.mT * d**-0.5, -1) @ v).transpose(0, 1).reshape(-1, self.h)
                )
            x = F.layer_norm(x + F.linear(torch.cat(parts), ow, ob), [self.h], g1, b1, 1e-12)
            y = F.linear(F.gelu(F.linear(x, uw, ub)), dw, db)
            x = F.layer_norm(x + y, [self.h], g2, b2, 1e-12)
        return x

    def gemms(self) -> float:
        """Median milliseconds of the layers' four linears alone, in a graph."""
        xs = {
            self.h: self.x,
            self.i: torch.randn(self.tokens, self.i, device="cuda", dtype=self.dtype),
        }

        def run() -> None:
            for layer in range(self.layers):
                for w, b in ((0, 1), (2, 3), (6, 7), (8, 9)):
                    F.linear(xs[self.w[w].shape[2]], self.w[w][layer], self.w[b][layer])

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(40):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return statistics.median(times[5:])

    def candidates(self, which: int) -> list[list[int]]:
        """Plans worth timing for GEMM `which`: enough blocks to fill the chip, not many more."""
        n = [3 * self.h, self.h, self.i, self.h][which]
        k = [self.h, self.h, self.h, self.i][which]
        found = []
        for tile, (rows, columns) in enumerate(TILES):
            blocks = -(-self.tokens // rows) * -(-n // columns)
            for split in (1, 2, 3, 4, 6, 8):
                steps = -(-k // 64 // split)
                if not 60 <= blocks * split <= 400 or (rows > 64 and rows >= 2 * self.tokens):
                    continue
                for stages in {min(steps, 12), min(steps, 6), min(steps, 3)}:
                    if stages == steps or which != 1:  # attention's input is held whole
                        found.append([tile, split, stages])
        return found

    def tune(self, plan: list[int], seconds: float) -> tuple[list[int], float]:
        """Coordinate descent over the four GEMMs, timing the whole chain."""

        def flagged(plan: list[int]) -> list[int]:
            plans = [[*plan[:12], far, fetch] for far in (0, 1) for fetch in (0, 1)]
            times = [(ms, p) for p in plans if (ms := self.time(p)) > 0]
            return min(times)[1] if times else plan

        plan = flagged(plan)
        best, limit = self.time(plan), time.monotonic() + seconds
        for _ in range(3):
            before = best
            for which in (3, 2, 0, 1):
                for c in self.candidates(which):
                    trial = [*plan[: 3 * which], *c, *plan[3 * which + 3 :]]
                    ms = self.time(trial, 12)
                    if 0 < ms < best:
                        best, plan = ms, trial
                    if time.monotonic() > limit:
                        break
            plan = flagged(plan)
            best = self.time(plan)
            if best > 0.99 * before or time.monotonic() > limit:
                break
        return plan, best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--tune", type=float, default=0.0, help="seconds a workload")
    parser.add_argument("--only", default="", help="comma-separated parts of workload names")
    parser.add_argument("--json")
    args = parser.parse_args()
    lib = ctypes.CDLL(args.library)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for name, (dims, lengths) in WORKLOADS.items():
        if not any(part in name for part in args.only.split(",")):
            continue
        model = Model(lib, dims, lengths, torch.float16)
        plan = model.plan()
        if plan is None:
            print(name, "not served")
            continue
        gemms = model.gemms()
        exact = model.torch(torch.float32)

        def error(x: torch.Tensor, exact: torch.Tensor = exact) -> float:
            return float((x.float() - exact).norm() / exact.norm())

        plain, own = error(model.torch(torch.float16)), error(model.ours(plan))
        row = {
            "workload": name,
            "tokens": model.tokens,
            "gemms": gemms,
            "ms": model.time(plan),
            "plan": plan,
            "error_ratio": own / plain,
        }
        print(
            f"{name}: gemms {gemms:.4f} ours {row['ms']:.4f} ({row['ms'] / gemms:.2f}x) "
            f"plan {plan} "
            f"error {own:.2e} = {row['error_ratio']:.2f} x plain",
            flush=True,
        )
        if args.tune:
            tuned, ms = model.tune(plan, args.tune)
            own = error(model.ours(tuned))
            row |= {"tuned_plan": tuned, "tuned_ms": ms}
            print(
                f"   tuned {ms:.4f} ({ms / gemms:.2f}x) plan {tuned} "
                f"error {own / plain:.2f} x plain",
                flush=True,
            )
        rows.append(row)
    half = Model(lib, (4, 768, 3072, 12), [40, 20], torch.bfloat16)
    exact = half.torch(torch.float32)
    answers = (half.torch(torch.bfloat16), half.ours(half.plan() or []))
    errors = [float((x.float() - exact).norm() / exact.norm()) for x in answers]
    print(f"bf16: plain {errors[0]:.2e} ours {errors[1]:.2e}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
