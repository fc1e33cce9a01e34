"""What other activations and a relative bias cost the encoder: BERT-base beside its variants.

    python benchmarks/cuda/variants.py [--rows "base fixed" ...] [--dtype fp16|bf16] [--out x.json]

All are 12 layers of 768 with random weights, in CUDA graphs, interleaved round by round; figures
are medians. `bias` is what MPNet-base has: 12 heads, distances up to 128. With --kernels, also the
microseconds of a layer's attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ft_handler import build_info, load_library
from ft_handler.model.encoder import weight_names
from ft_handler.model.spec import EncoderSpec
from ft_handler.tuning import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoder import Run, cuda_times, graphed, kernel_profile, workloads
from gemm import SIZES
from provenance import provenance

ROWS = ["base fixed b1 s128", "base fixed b8 s128", "base fixed b32 s128", "base ragged b64 s384"]
# Activation and the largest distance of a relative bias.
VARIANTS = {
    "bert": ("gelu", 0),
    "bias": ("gelu", 128),
    "gelu_tanh": ("gelu_tanh", 0),
    "relu": ("relu", 0),
    "silu": ("silu", 0),
}


def random_weights(spec: EncoderSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights under the names that the op knows, those of its products prepared."""
    layers, hidden, inner = spec.num_layers, spec.hidden_size, spec.intermediate_size

    def normal(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    weights = {
        "embeddings.word": normal(30522, hidden),
        "embeddings.position": normal(512, hidden),
        "embeddings.token_type": normal(2, hidden),
        "embeddings.norm.weight": 1 + normal(hidden),
        "embeddings.norm.bias": normal(hidden),
    }
    sizes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden)}
    for name, (n, k) in {**sizes, "up": (inner, hidden), "down": (hidden, inner)}.items():
        prepare = torch.ops.fastertransformer.prepare_weight
        weights[f"layers.{name}.weight"] = prepare(normal(layers, n, k, scale=k**-0.5))
        weights[f"layers.{name}.bias"] = normal(layers, n)
    for name in ("norm1", "norm2"):
        weights[f"layers.{name}.weight"] = 1 + normal(layers, hidden)
        weights[f"layers.{name}.bias"] = normal(layers, hidden)
    if spec.relative_distance:
        columns = 2 * spec.relative_distance + 1
        weights["attention.relative_bias"] = normal(spec.num_heads, columns, scale=2.0)
    return weights


def variant(activation: str, distance: int, lengths: np.ndarray, dtype: torch.dtype) -> Run:
    """One forward pass of the encoder over sequences of these lengths."""
    layers, hidden, inner, heads = SIZES["base"]
    spec = EncoderSpec(
        hidden_size=hidden,
        embedding_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        activation=activation,
        layer_norm_eps=1e-12,
        relative_distance=distance,
    )
    names = weight_names(spec)
    named = random_weights(spec, dtype)
    weights, text = [named[name] for name in names], spec.text(names)
    ids = torch.randint(1000, 30000, (int(lengths.sum()),), device="cuda")
    types, longest = torch.zeros_like(ids), int(lengths.max())
    cu_seqlens = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), device="cuda").int()
    encode = torch.ops.fastertransformer.encode
    return lambda: encode(ids, types, None, cu_seqlens, longest, weights, text, "")


def attention_us(run: Run) -> float:
    """Microseconds of one layer's attention."""
    return sum(
        kernel["us"] / kernel["calls"]
        for kernel in kernel_profile(run)
        if "attention_kernel" in kernel["kernel"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=20, help="a round")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[arguments.dtype]
    torch.manual_seed(0)
    load_library()
    table.load_table()  # as the handler does
    rows: list[dict[str, Any]] = []
    for name, _, lengths in workloads(arguments.rows):
        runs = {v: variant(*VARIANTS[v], lengths, dtype) for v in arguments.variants}
        graphs = {v: graphed(run) for v, run in runs.items()}
        times = cuda_times(graphs, arguments.rounds, arguments.iterations)
        row: dict[str, Any] = {"workload": name, "tokens": int(lengths.sum())}
        row["ms"] = {v: statistics.median(t) for v, t in times.items()}
        if arguments.kernels:
            row["attention_us"] = {v: attention_us(runs[v]) for v in arguments.variants}
        rows.append(row)
        print(row, flush=True)
    if arguments.out:
        record = {"provenance": provenance(library=build_info()), "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
