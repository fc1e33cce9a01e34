"""Our e4m3 products beside cuBLASLt's (torch._scaled_mm) and fp16's: right first, then timed.

    python benchmarks/cuda/fp8_gemm.py fp8_gemm.so [ROWS ...]
"""

from __future__ import annotations

import ctypes
import statistics
import sys

import torch

E4 = torch.float8_e4m3fn
TILES = ("128x192 c2", "128x192", "128x128 c2", "64x128", "64x256", "64x256 c2", "together 128x128")
library = ctypes.CDLL(sys.argv[1])


def p(t):
    return ctypes.c_void_p(0 if t is None else t.data_ptr())


def ours(x, w, scale, bias, residual, out, gelu, out_scale, variant):
    status = library.fp8_gemm(
        p(x), p(w), p(scale), p(bias), p(residual), p(out), x.shape[0], w.shape[0], w.shape[1],
        int(gelu), ctypes.c_float(out_scale), int(out.dtype == E4), variant,
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )  # fmt: skip
    if status:
        raise RuntimeError(f"status {status}")


def narrow_order(n):
    """The row of the weight that stands at each column of a tile, for an 8-bit output."""
    order = torch.empty(n, dtype=torch.long)
    for a in range(n):
        group, inner = divmod(a, 16)
        q, i = divmod(inner % 8, 2)
        order[a] = group * 16 + 4 * q + i + (2 if inner >= 8 else 0)
    return order


def check():
    torch.manual_seed(0)
    for rows, n, k in ((1, 256, 256), (7, 768, 128), (113, 2304, 768), (511, 3072, 768),
                       (4097, 768, 3072), (1000, 4096, 1024)):  # fmt: skip
        x = torch.randn(rows, k, device="cuda").to(E4)
        w = (torch.randn(n, k, device="cuda") * 4).to(E4)
        scale = torch.rand(n, device="cuda") * 0.02 + 0.001
        bias = torch.randn(n, device="cuda").half()
        residual = torch.randn(rows, n, device="cuda").half()
        exact = x.float() @ w.float().T * scale + bias.float()
        order = narrow_order(n).cuda()
        for variant in range(len(TILES)):
            out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.half)
            ours(x, w, scale, bias, residual, out, False, 1.0, variant)
            want = exact + residual.float()
            e1 = float((out.float() - want).norm() / want.norm())
            ours(x, w, scale, bias, None, out, True, 1.0, variant)
            want = torch.nn.functional.gelu(exact)
            e2 = float((out.float() - want).norm() / want.norm())
            small = torch.zeros(rows, n, device="cuda", dtype=E4)
            ours(x, w[order].contiguous(), scale[order].contiguous(), bias[order].contiguous(), None,
                 small, True, 8.0, variant)  # fmt: skip
            ideal = (want * 8).clamp(-448, 448).to(E4).float()
            e3 = float((small.float() - ideal).norm() / ideal.norm())
            print(rows, n, k, TILES[variant], f"{e1:.1e} {e2:.1e} {e3:.1e}", flush=True)
            assert e1 < 2e-3 and e2 < 2e-3 and e3 < 1.5e-2, "WRONG"


def graphed(run, copies):
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    return graph


def times(graphs, copies, rounds=7):
    found = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            graph.replay()
            a, b = torch.cuda.Event(True), torch.cuda.Event(True)
            a.record()
            graph.replay()
            graph.replay()
            b.record()
            torch.cuda.synchronize()
            found[name].append(a.elapsed_time(b) * 1e3 / 2 / copies)
    return {name: statistics.median(t) for name, t in found.items()}


def measure(rows, hidden):
    copies = 12
    for kind, n, k in (("qkv", 3 * hidden, hidden), ("out", hidden, hidden),
                       ("up", 4 * hidden, hidden), ("down", hidden, 4 * hidden)):  # fmt: skip
        x16 = torch.randn(rows, k, device="cuda").half()
        x = x16.to(E4)
        w16 = [torch.randn(n, k, device="cuda").half() for _ in range(copies)]
        w = [t.to(E4) for t in w16]
        one = torch.ones((), device="cuda")
        scale = torch.rand(n, device="cuda") * 0.02
        bias = torch.randn(n, device="cuda").half()
        residual = torch.randn(rows, n, device="cuda").half() if kind in ("out", "down") else None
        gelu = kind == "up"
        out = torch.empty(rows, n, device="cuda", dtype=E4 if gelu else torch.half)
        graphs = {
            "fp16 bare": graphed(lambda i: torch.mm(x16, w16[i].T), copies),
            "fp8 bare": graphed(
                lambda i: torch._scaled_mm(x, w[i].T, scale_a=one, scale_b=one,
                                           out_dtype=torch.half, use_fast_accum=True), copies),
        }  # fmt: skip
        for v, tile in enumerate(TILES):
            graphs[tile] = graphed(
                lambda i, v=v: ours(x, w[i], scale, bias, residual, out, gelu, 8.0, v), copies
            )
        us = times(graphs, copies)
        print(rows, hidden, kind, {name: round(t, 1) for name, t in us.items()}, flush=True)
        del graphs, w, w16


check()
for rows in map(int, sys.argv[2:] or ["4096", "15872"]):
    measure(rows, 768)
    measure(rows, 1024)
