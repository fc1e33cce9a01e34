"""Our e4m3 products beside cuBLASLt's (torch._scaled_mm) and fp16's: right first, then timed.

    nvcc --generate-code=arch=compute_90a,code=[sm_90a] -std=c++20 -O3 --expt-relaxed-constexpr \
        -shared -Xcompiler -fPIC -Icsrc benchmarks/cuda/fp8_gemm.cu \
        csrc/kernels/cuda/gemm_fp8_sm90.cu csrc/kernels/cuda/gemm_fp8_norm_sm90.cu \
        csrc/kernels/cuda/layer_norm.cu csrc/kernels/cuda/runtime.cpp -o fp8_gemm.so -ldl
    python benchmarks/cuda/fp8_gemm.py ./fp8_gemm.so [few|ROWS ...]

Checks all sizes first, or with `few` small ones alone, for a sanitizer.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import sys
from dataclasses import dataclass

import torch

E4 = torch.float8_e4m3fn
F = torch.nn.functional
TILES = ("128x192 c2", "128x192", "128x128 c2", "64x128", "together 128x128")
TRIO = len(TILES)  # of e4m3 outputs alone
NORM_TILES = {768: {0: "128x192 c4", 1: "64x192 c4", 2: "64x128 c6", 5: "trio 64x192 c4"},
              1024: {3: "64x256 c4", 4: "128x128 c8"}}  # fmt: skip
library = ctypes.CDLL(sys.argv[1])


class Product(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p)
                for name in ("x", "w", "scale", "bias", "residual", "gamma", "beta", "out",
                             "narrow", "out_scale")]  # fmt: skip
    _fields_ += [(name, ctypes.c_int) for name in ("rows", "n", "k", "gelu", "narrow_out")]


@dataclass
class Problem:
    x: torch.Tensor  # e4m3 [rows, k]
    w: list[torch.Tensor]  # e4m3 [n, k], as many as layers
    scale: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor | None
    gamma: torch.Tensor
    beta: torch.Tensor
    step: torch.Tensor  # what a unit of an e4m3 output is worth

    @classmethod
    def random(cls, rows, n, k, layers=1):
        def half(*shape):
            return torch.randn(shape, device="cuda").half()

        return cls(
            half(rows, k).to(E4), [(half(n, k) * 4).to(E4) for _ in range(layers)],
            torch.rand(n, device="cuda") * 0.02 + 0.001, half(n), half(rows, n), half(n), half(n),
            torch.tensor(1 / 8, device="cuda"),
        )  # fmt: skip

    def run(self, entry, variant, out, *, layer=0, gelu=False, residual=True, narrow=None):
        tensors = {"x": self.x, "w": self.w[layer], "scale": self.scale, "bias": self.bias,
                   "residual": self.residual if residual else None, "gamma": self.gamma,
                   "beta": self.beta, "out": out, "narrow": narrow,
                   "out_scale": self.step}  # fmt: skip
        (rows, k), (n,) = self.x.shape, self.bias.shape
        q = Product(rows=rows, n=n, k=k, gelu=gelu, narrow_out=out.dtype == E4)
        for name, tensor in tensors.items():
            setattr(q, name, None if tensor is None else tensor.data_ptr())
        launched(entry(ctypes.byref(q), variant, stream()))


def stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def launched(status):
    if status:
        raise RuntimeError(f"status {status}")


def layer_norm(problem, x, out):
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, problem.gamma, problem.beta, out)]
    launched(library.layer_norm(*pointers, *x.shape, stream()))


def narrow_order(n):
    """The column at each place of an e4m3 output."""
    sixteen = [c for q in range(4) for c in (2 * q, 2 * q + 1, 8 + 2 * q, 8 + 2 * q + 1)]
    return torch.tensor([16 * group + c for group in range(n // 16) for c in sixteen]).cuda()


def narrowed(exact, step):
    return (exact[:, narrow_order(exact.shape[1])] / step).clamp(-448, 448).to(E4).float()


def error(got, want):
    got = got.float()
    if not torch.isfinite(got).all():
        raise AssertionError("not finite")
    return float((got - want).norm() / want.norm())


def require(name, errors, bounds):
    print(name, " ".join(f"{e:.1e}" for e in errors), flush=True)
    if any(e >= bound for e, bound in zip(errors, bounds, strict=True)):
        raise AssertionError(f"{name}: wrong")


def check(shapes):
    torch.manual_seed(0)
    for rows, n, k in shapes:
        problem = Problem.random(rows, n, k)
        exact = problem.x.float() @ problem.w[0].float().T * problem.scale + problem.bias.float()
        added = exact + problem.residual.float()
        active = F.gelu(exact)
        nans = torch.full((rows + 1, n), float("nan"), device="cuda", dtype=torch.half)
        for variant, tile in enumerate(TILES):
            out, small = nans.clone(), nans.to(E4)
            problem.run(library.fp8_gemm, variant, out)
            errors = [error(out[:rows], added)]
            problem.run(library.fp8_gemm, variant, out, gelu=True, residual=False)
            errors.append(error(out[:rows], active))
            problem.run(library.fp8_gemm, variant, small, gelu=True, residual=False)
            errors.append(error(small[:rows], narrowed(active, problem.step)))
            require(f"{rows} {n} {k} {tile}", errors, (2e-3, 2e-3, 1.5e-2))
            if not out[rows].isnan().all() or not small[rows].float().isnan().all():
                raise AssertionError("rows beyond the last were written")
        small = nans.to(E4)
        problem.run(library.fp8_gemm, TRIO, small, gelu=True, residual=False)
        off = error(small[:rows], narrowed(active, problem.step))
        require(f"{rows} {n} {k} trio 128x128", [off], [1.5e-2])
        for variant, tile in NORM_TILES.get(n, {}).items():
            for residual in (True, False):
                want = F.layer_norm(
                    added if residual else exact, (n,), problem.gamma.float(), problem.beta.float()
                )
                out, small = nans.clone(), nans.to(E4)
                problem.run(library.fp8_norm_gemm, variant, out, residual=residual)
                errors = [error(out[:rows], want)]
                problem.run(library.fp8_norm_gemm, variant, out, residual=residual, narrow=small)
                errors += [
                    error(out[:rows], want),
                    error(small[:rows], narrowed(want, problem.step)),
                ]
                require(f"{rows} {n} {k} norm {tile}", errors, (2e-3, 2e-3, 1.5e-2))
                if not small[rows].float().isnan().all():
                    raise AssertionError("rows beyond the last were written")


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


def candidates(kind, rows, n, k, copies):
    """What to time, by name: run(layer)."""
    problem = Problem.random(rows, n, k, copies)
    halves = problem.x.half(), [w.half() for w in problem.w]
    one = torch.ones((), device="cuda")
    gelu, normed = kind == "up", kind in ("out", "down")
    out = torch.empty(rows, n, device="cuda", dtype=E4 if gelu else torch.half)
    final, narrow = torch.empty_like(out), torch.empty(rows, n, device="cuda", dtype=E4)

    def plain(variant, i):
        problem.run(library.fp8_gemm, variant, out, layer=i, gelu=gelu, residual=normed)

    def then_norm(variant, i):
        plain(variant, i)
        layer_norm(problem, out, final)

    def with_norm(variant, copy, i):
        problem.run(library.fp8_norm_gemm, variant, out, layer=i, narrow=copy)

    found = {
        "fp16 bare": lambda i: torch.mm(halves[0], halves[1][i].T),
        "fp8 bare": lambda i: torch._scaled_mm(
            problem.x, problem.w[i].T, scale_a=one, scale_b=one, out_dtype=torch.half,
            use_fast_accum=True,
        ),
    }  # fmt: skip
    for variant, tile in enumerate(TILES):
        found[tile] = functools.partial(plain, variant)
        if normed:
            found[f"{tile}, then norm"] = functools.partial(then_norm, variant)
    if gelu:
        found["trio 128x128"] = functools.partial(plain, TRIO)
    for variant, tile in NORM_TILES[n].items() if normed else ():
        found[f"norm {tile}"] = functools.partial(with_norm, variant, None)
        found[f"norm {tile} and e4m3"] = functools.partial(with_norm, variant, narrow)
    return found


def measure(rows, hidden):
    copies = 12
    for kind, n, k in (("qkv", 3 * hidden, hidden), ("out", hidden, hidden),
                       ("up", 4 * hidden, hidden), ("down", hidden, 4 * hidden)):  # fmt: skip
        runs = candidates(kind, rows, n, k, copies)
        us = times({name: graphed(run, copies) for name, run in runs.items()}, copies)
        print(rows, hidden, kind, {name: round(t, 1) for name, t in us.items()}, flush=True)


SMALL = ((7, 768, 128), (113, 768, 256), (65, 1024, 256), (130, 256, 384))
LARGE = ((1, 256, 256), (113, 2304, 768), (511, 3072, 768), (4097, 768, 3072), (1000, 4096, 1024),
         (1300, 1024, 4096))  # fmt: skip

if sys.argv[2:] == ["few"]:
    check(SMALL)
else:
    check(SMALL + LARGE)
    for rows in map(int, sys.argv[2:]):
        measure(rows, 768)
        measure(rows, 1024)
