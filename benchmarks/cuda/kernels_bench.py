"""Checks the CUDA kernels against eager PyTorch, then times them beside FlashAttention-2's kernel.

    python benchmarks/cuda/kernels_bench.py libkernels.so [--check] [--time] [--json out.json]

Times are medians over graph replays of 20 chained calls, in microseconds a call;
FlashAttention-2 is torch.ops.aten._flash_attention_forward on the same packed tensor.
Bandwidths count every operand once.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Kernels:
    """The C interface of kernels_api.cu over torch tensors."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        self.lib.ft_attention_plan_bytes.restype = ctypes.c_size_t

    @staticmethod
    def _argument(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return ctypes.c_void_p(value.data_ptr())
        if value is None:
            return ctypes.c_void_p(None)
        return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)

    def call(self, name: str, *arguments: Any, pdl: bool = False) -> None:
        """Run one kernel on the current stream; raises on a CUDA error."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(self.lib, name)(
            *(self._argument(a) for a in arguments), stream, ctypes.c_int(pdl)
        )
        if status != 0:
            raise RuntimeError(f"{name} returned CUDA error {status}")


class Attention:
    """varlen attention over one set of lengths."""

    def __init__(
        self,
        kernels: Kernels,
        cu: torch.Tensor,
        tokens: int,
        longest: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.kernels, self.cu = kernels, cu
        self.shape = (cu.numel() - 1, tokens, longest, heads, head_dim, DTYPES[dtype])
        size = kernels.lib.ft_attention_plan_bytes(*self.shape)
        self.plan = torch.full((max(size, 16),), 0xFF, dtype=torch.uint8, device="cuda")
        self.make_plan()

    def make_plan(self) -> None:
        """List the tiles for what cu_seqlens holds now."""
        self.kernels.call("ft_attention_plan", *self.shape, self.cu, self.plan)

    def __call__(self, qkv: torch.Tensor, out: torch.Tensor, pdl: bool = False) -> None:
        self.kernels.call("ft_varlen_attention", *self.shape, qkv, self.plan, out, pdl=pdl)


def reference(qkv: torch.Tensor, lengths: Sequence[int], heads: int) -> torch.Tensor:
    """Eager attention per sequence in qkv's dtype."""
    width = qkv.shape[1] // 3
    parts, begin = [], 0
    for n in lengths:
        q, k, v = qkv[begin : begin + n].view(n, 3, heads, width // heads).permute(1, 2, 0, 3)
        p = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width // heads), -1)
        parts.append((p @ v).permute(1, 0, 2).reshape(n, width))
        begin += n
    return torch.cat(parts) if parts else qkv.new_zeros(0, width)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64; infinite when a holds a NaN."""
    a, b = a.double(), b.double()
    if not bool(torch.isfinite(a).all()):
        return math.inf
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def check_attention(kernels: Kernels) -> list[str]:
    """Every head size, dtype and awkward length; the failures in words."""
    failures = []
    rng = np.random.default_rng(1)
    cases: list[tuple[list[int], int, int]] = [  # lengths, rows of padding, empty sequences
        ([1], 0, 0), ([7], 0, 0), ([113], 0, 0), ([511], 0, 0), ([4096], 0, 0),
        ([1, 7, 113, 511, 64, 65, 128, 129], 0, 0),
        ([3, 30, 25, 1, 64, 2, 17], 9, 3), ([120, 3, 128, 77], 100, 5), ([300, 50, 129], 333, 2),
        ([500, 512, 1, 448, 385], 7, 1), (rng.integers(4, 52, 512).tolist(), 0, 0),
        (rng.integers(20, 128, 64).tolist(), 0, 0), (rng.integers(20, 384, 64).tolist(), 5, 4),
        ([1] * 1500, 0, 0), ([193, 577, 1025], 0, 0),
    ]  # fmt: skip
    for head_dim in (2, 6, 32, 48, 64, 80, 96, 128):
        heads = 3 if head_dim > 8 else 4
        for dtype in DTYPES:
            worst = 0.0
            for lengths, pad, empty in cases:
                if max(lengths) > 1000 and head_dim not in (32, 64, 128):
                    continue
                tokens, longest = sum(lengths), max(lengths)
                cu = np.concatenate([[0], np.cumsum(lengths), np.full(empty, tokens)])
                cu_device = torch.tensor(cu, dtype=torch.int32, device="cuda")
                wide = torch.randn(tokens + pad, 3 * heads * head_dim, device="cuda")
                wide[:, : heads * head_dim] *= 2
                qkv = wide.to(dtype)
                qkv[tokens:] = math.nan
                for stretch in (0, 1000):
                    attention = Attention(
                        kernels, cu_device, tokens + pad, longest + stretch, heads, head_dim, dtype
                    )
                    out = torch.full(
                        (tokens + pad, heads * head_dim), math.nan, device="cuda", dtype=dtype
                    )
                    attention(qkv, out)
                    again = torch.full_like(out, 7.0)
                    attention(qkv, again, pdl=True)
                    exact = reference(qkv[:tokens].float(), lengths, heads)
                    plain = relative(reference(qkv[:tokens], lengths, heads), exact)
                    ours = relative(out[:tokens], exact)
                    budget = max(2 * plain, 2e-6)
                    worst = max(worst, ours / budget)
                    same = torch.equal(out[:tokens], again[:tokens])
                    untouched = bool(torch.isnan(out[tokens:]).all())
                    if not (ours <= budget and same and untouched):
                        failures.append(
                            f"attention d={head_dim} {dtype} lengths {lengths[:8]} +{stretch}: "
                            f"error {ours:.2e}, plain {plain:.2e}, same {same}, "
                            f"untouched {untouched}"
                        )
            print(
                f"attention d={head_dim} {dtype}: error at most {worst:.2f} of the budget",
                flush=True,
            )
    return failures


def check_rows(kernels: Kernels) -> list[str]:
    """Layer norms, embeddings and GELU; the failures in words."""
    failures = []

    def compare(name: str, ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        budget = max(2 * relative(plain, exact), 1e-6)
        if not relative(ours, exact) <= budget:
            failures.append(f"{name}: error {relative(ours, exact):.2e}, budget {budget:.2e}")

    layer_norm = torch.nn.functional.layer_norm
    for dtype, code in DTYPES.items():
        for hidden in (8, 30, 250, 256, 384, 768, 1024, 1280, 4096, 8200):
            for rows in (1, 7, 511, 4096 if hidden <= 1024 else 3):
                x, r = (torch.randn(rows, hidden, device="cuda", dtype=dtype) for _ in range(2))
                b, g, t = (torch.randn(hidden, device="cuda", dtype=dtype) for _ in range(3))
                out = torch.empty_like(x)
                kernels.call(
                    "ft_residual_layer_norm", x, b, r, g, t, 1e-12, rows, hidden, code, out
                )
                compare(
                    f"layer norm {dtype} {rows}x{hidden}",
                    out,
                    layer_norm(x + b + r, (hidden,), g, t, 1e-12),
                    layer_norm(
                        x.float() + b.float() + r.float(), (hidden,), g.float(), t.float(), 1e-12
                    ),
                )
                kernels.call("ft_bias_gelu", x, b, rows, hidden, code, out)
                gelu = torch.nn.functional.gelu
                compare(
                    f"gelu {dtype} {rows}x{hidden}", out, gelu(x + b), gelu(x.float() + b.float())
                )
            lengths = np.random.default_rng(2).integers(1, 40, 70)
            tokens, pad = int(lengths.sum()), 5
            cu = torch.tensor(
                np.concatenate([[0], np.cumsum(lengths), [tokens] * 3]), device="cuda"
            ).int()
            word, position, kind = (
                torch.randn(n, hidden, device="cuda", dtype=dtype) for n in (100, 40, 2)
            )
            g, t = (torch.randn(hidden, device="cuda", dtype=dtype) for _ in range(2))
            for int_type, id_code in ((torch.int32, 0), (torch.int64, 1)):
                ids = torch.randint(0, 100, (tokens + pad,), device="cuda", dtype=int_type)
                types = torch.randint(0, 2, (tokens + pad,), device="cuda", dtype=int_type)
                columns = torch.tensor(
                    np.concatenate([np.arange(n) for n in lengths]), device="cuda"
                ).int()
                for given in (None, columns):
                    out = torch.full((tokens + pad, hidden), math.nan, device="cuda", dtype=dtype)
                    kernels.call(
                        "ft_embedding_layer_norm", ids, types, id_code, given, cu, cu.numel() - 1,
                        tokens + pad, hidden, word, 100, position, 40, kind, 2, g, t, 1e-12, code,
                        out,
                    )  # fmt: skip
                    rows_ = [
                        w[i.long()]
                        for w, i in (
                            (word, ids[:tokens]),
                            (position, columns),
                            (kind, types[:tokens]),
                        )
                    ]
                    compare(
                        f"embedding {dtype} {hidden}",
                        out[:tokens],
                        layer_norm(rows_[0] + rows_[1] + rows_[2], (hidden,), g, t, 1e-12),
                        layer_norm(
                            sum(r.float() for r in rows_), (hidden,), g.float(), t.float(), 1e-12
                        ),
                    )
                    if out[tokens:].any():
                        failures.append(f"embedding {dtype} {hidden}: padding rows are not zero")
    return failures


def microseconds(call: Callable[[], object], calls: int = 20, replays: int = 15) -> float:
    """Median time of one call inside a captured graph of `calls`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def workloads() -> list[tuple[str, int, np.ndarray]]:
    """(name, heads, lengths): GOALS' table in its own draw order, then lengths of real traffic."""
    rng = np.random.default_rng(0)
    rows = []
    for name, kind, batch, longest in [
        ("base", "fixed", 1, 32), ("base", "fixed", 1, 128), ("base", "fixed", 8, 128),
        ("base", "fixed", 1, 384), ("base", "fixed", 32, 128), ("base", "ragged", 16, 64),
        ("base", "ragged", 16, 128), ("base", "ragged", 16, 256), ("base", "ragged", 16, 512),
        ("base", "ragged", 64, 128), ("base", "ragged", 128, 128), ("base", "ragged", 64, 384),
        ("base", "ragged", 256, 384), ("large", "fixed", 1, 128), ("large", "ragged", 64, 384),
    ]:  # fmt: skip
        lengths = np.full(batch, longest)
        if kind == "ragged":
            lengths = rng.integers(int(0.2 * longest), longest + 1, size=batch)
            lengths[0] = longest
        rows.append((f"{name} {kind} b{batch} s{longest}", 16 if name == "large" else 12, lengths))
    short = np.clip(np.random.default_rng(3).normal(25, 10, 256), 5, 60).astype(int)
    rows.append(("base SST-2 b256", 12, short))
    squad = np.clip(np.random.default_rng(4).gamma(7, 25, 64), 40, 384).astype(int)
    rows.append(("base SQuAD b64", 12, squad))
    rows.append(("base fixed b4 s4096", 12, np.full(4, 4096)))
    return rows


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """The row with two decimals, for printing."""
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


def time_attention(
    kernels: Kernels, name: str, heads: int, head_dim: int, lengths: np.ndarray
) -> dict[str, Any]:
    """Attention of one fp16 layer, ours beside FlashAttention-2."""
    cu = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), device="cuda").int()
    tokens, longest, width = int(lengths.sum()), int(lengths.max()), heads * head_dim
    qkv = torch.randn(tokens, 3 * width, device="cuda", dtype=torch.float16)
    out = torch.empty(tokens, width, device="cuda", dtype=torch.float16)
    attention = Attention(kernels, cu, tokens, longest, heads, head_dim, torch.float16)
    q, k, v = qkv.view(tokens, 3, heads, head_dim).unbind(1)
    flash = torch.ops.aten._flash_attention_forward
    row: dict[str, Any] = {
        "workload": name,
        "head_dim": head_dim,
        "tokens": tokens,
        "flash2_us": microseconds(
            lambda: flash(q, k, v, cu, cu, longest, longest, 0.0, False, False)
        ),
        "ours_us": microseconds(lambda: attention(qkv, out)),
        "ours_pdl_us": microseconds(lambda: attention(qkv, out, pdl=True)),
        "plan_us": microseconds(attention.make_plan),
    }
    row["tflops"] = 4e-6 * width * float((lengths.astype(float) ** 2).sum()) / row["ours_us"]
    row["gb_s"] = tokens * width * 8e-3 / row["ours_us"]
    return row


def time_rows(kernels: Kernels, rows: int) -> dict[str, Any]:
    """Layer norm and embedding at 768 columns, GELU at 3,072: microseconds and GB/s, fp16."""
    copies = max(2, min(8, 400_000_000 // (rows * 768 * 6)))
    sets = [
        [torch.randn(rows, 768, device="cuda", dtype=torch.float16) for _ in range(3)]
        for _ in range(copies)
    ]
    wide = torch.randn(rows, 3072, device="cuda", dtype=torch.float16)
    g, b, up = (torch.randn(n, device="cuda", dtype=torch.float16) for n in (768, 768, 3072))
    ids = torch.randint(0, 30000, (rows,), device="cuda")
    cu = torch.arange(0, rows + 1, 32, device="cuda").int()
    cu[-1] = rows
    word = torch.randn(30522, 768, device="cuda", dtype=torch.float16)
    turn = itertools.count()

    def norm(pdl: bool) -> None:
        x, r, o = sets[next(turn) % copies]
        kernels.call("ft_residual_layer_norm", x, b, r, g, b, 1e-12, rows, 768, 1, o, pdl=pdl)

    def embed() -> None:
        tables = (word, 30522, word, 512, word, 2)
        kernels.call(
            "ft_embedding_layer_norm",
            *(ids, ids, 1, None, cu, cu.numel() - 1, rows, 768, *tables, g, b, 1e-12, 1, wide),
        )

    def activate() -> None:
        kernels.call("ft_bias_gelu", wide, up, rows, 3072, 1, wide)

    row: dict[str, Any] = {
        "rows": rows,
        "layer_norm_us": microseconds(lambda: norm(False)),
        "layer_norm_pdl_us": microseconds(lambda: norm(True)),
        "gelu_us": microseconds(activate),
        "embedding_us": microseconds(embed),
    }
    row["layer_norm_gb_s"] = rows * 768 * 6e-3 / row["layer_norm_us"]
    row["gelu_gb_s"] = rows * 3072 * 4e-3 / row["gelu_us"]
    return row


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    kernels = Kernels(options.library)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if options.check:
        failures = check_attention(kernels) + check_rows(kernels)
        for line in failures[:40]:
            print("FAIL", line)
        print(f"{len(failures)} failures")
        results["failures"] = failures
    if options.time:
        results["attention"] = []
        for head_dim in (64, 32):
            for name, heads, lengths in workloads():
                if head_dim == 64 or name.startswith("base ragged"):
                    row = time_attention(kernels, name, heads, head_dim, lengths)
                    results["attention"].append(row)
                    print(rounded(row), flush=True)
        results["rows"] = []
        for rows in (32, 128, 1024, 6264, 15071, 61002):
            results["rows"].append(time_rows(kernels, rows))
            print(rounded(results["rows"][-1]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
