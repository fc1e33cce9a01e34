"""The whole encoder stack beside plain torch on one GPU: its error, its time, its kernels.

Every time is the median of CUDA-graph replays. gemm_variants.cu times the linear layers alone.

    python benchmarks/cuda/gemm.py encoder [workload ...]
    python benchmarks/cuda/gemm.py kernels [workload ...]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoder import workloads

SIZES = {"base": (12, 768, 3072, 12), "large": (24, 1024, 4096, 16)}
EPS = 1e-12


def graphed(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`body` captured in a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def interleaved(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of each graph's replay, the graphs taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for name in graphs:
        graphs[name].replay()
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: float(np.median(t)) for name, t in times.items()}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference).norm() / reference.norm())


class Packed(torch.nn.Module):
    """The stack in plain torch over packed tokens, with FlashAttention-2."""

    def __init__(self, layers: int, hidden: int, wide: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layers = torch.nn.ModuleList()
        for _ in range(layers):
            layer = torch.nn.Module()
            layer.qkv = torch.nn.Linear(hidden, 3 * hidden)
            layer.out = torch.nn.Linear(hidden, hidden)
            layer.norm1 = torch.nn.LayerNorm(hidden, eps=EPS)
            layer.up = torch.nn.Linear(hidden, wide)
            layer.down = torch.nn.Linear(wide, hidden)
            layer.norm2 = torch.nn.LayerNorm(hidden, eps=EPS)
            self.layers.append(layer)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        tokens, hidden = x.shape
        for layer in self.layers:
            q, k, v = layer.qkv(x).view(tokens, 3, self.heads, -1).unbind(1)
            if x.dtype == torch.float32:  # FlashAttention has no fp32
                bounds = cu_seqlens.tolist()
                parts = [
                    functional.scaled_dot_product_attention(
                        *(t[a:b].transpose(0, 1)[None] for t in (q, k, v))
                    )[0].transpose(0, 1)
                    for a, b in itertools.pairwise(bounds)
                ]
                attended = torch.cat(parts)
            else:
                attended = torch.ops.aten._flash_attention_forward(
                    q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False
                )[0]
            x = layer.norm1(x + layer.out(attended.reshape(tokens, hidden)))
            x = layer.norm2(x + layer.down(functional.gelu(layer.up(x))))
        return x


def encoder_inputs(
    size: str, lengths: np.ndarray, dtype: torch.dtype
) -> tuple[Packed, tuple[torch.Tensor, ...], Callable[[], torch.Tensor], torch.Tensor]:
    """The plain model, (embedded x, cu_seqlens), our encoder as a call, and fp32 embeddings."""
    layers, hidden, wide, heads = SIZES[size]
    torch.manual_seed(0)
    model = Packed(layers, hidden, wide, heads).cuda()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.04)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    tokens, batch, longest = int(lengths.sum()), len(lengths), int(lengths.max())
    word = torch.randn(30522, hidden, device="cuda")
    position = torch.randn(512, hidden, device="cuda")
    token_type = torch.randn(2, hidden, device="cuda")
    gamma = torch.ones(hidden, device="cuda")
    beta = torch.zeros(hidden, device="cuda")
    ids = torch.randint(1000, 30000, (tokens,), device="cuda")
    types = torch.zeros_like(ids)
    cu = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), device="cuda", dtype=torch.int32)
    places = torch.cat([torch.arange(int(n), device="cuda") for n in lengths])
    embedded = functional.layer_norm(
        word[ids].to(dtype).float()
        + position[places].to(dtype).float()
        + token_type[types].to(dtype).float(),
        (hidden,),
        eps=EPS,
    )

    def stacked(part: str, what: str) -> torch.Tensor:
        stack = [getattr(getattr(layer, part), what) for layer in model.layers]
        return torch.stack([t.detach() for t in stack]).to(dtype).contiguous()

    args = [t.to(dtype) for t in (word, position, token_type, gamma, beta)]
    for part in ("qkv", "out", "norm1", "up", "down", "norm2"):
        args += [stacked(part, "weight"), stacked(part, "bias")]
    ops = torch.ops.fastertransformer

    def ours() -> torch.Tensor:
        out: torch.Tensor = ops.encoder(ids, types, None, cu, longest, *args, heads, EPS)
        return out

    assert batch + 1 == len(cu)
    return model, (embedded.to(dtype), cu), ours, embedded


def linear_layers(model: Packed, inputs: dict[int, torch.Tensor]) -> None:
    """The stack's linear layers and nothing else; `inputs` by width."""
    for layer in model.layers:
        for part in (layer.qkv, layer.out, layer.up, layer.down):
            part(inputs[part.in_features])


@torch.no_grad()
def encoder(wanted: list[str]) -> dict[str, object]:
    """Milliseconds of the stack: ours, packed torch, the linear layers alone; and the errors."""
    results: dict[str, object] = {}
    for name, size, lengths in workloads(wanted):
        _, hidden, wide, _ = SIZES[size]
        longest, tokens = int(lengths.max()), int(lengths.sum())
        model, (x, cu), ours, embedded = encoder_inputs(size, lengths, torch.float16)
        row: dict[str, float] = {"tokens": tokens}
        exact = model(embedded, cu, longest) if tokens < 3000 else None
        half = model.half()
        if exact is not None:
            row["error"] = relative_error(ours(), exact)
            row["torch_error"] = relative_error(half(x, cu, longest), exact)
        else:
            row["difference"] = relative_error(ours(), half(x, cu, longest).float())
        inputs = {hidden: x, wide: torch.randn(tokens, wide, device="cuda").half()}

        graphs = {
            "ours": graphed(ours),
            "packed": graphed(functools.partial(half, x, cu, longest)),
            "gemms": graphed(functools.partial(linear_layers, half, inputs)),
        }
        row |= interleaved(graphs, 20)
        results[name] = row
        print(
            f"{name:26s} {tokens:6d} "
            + " ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "tokens")
            + f" | of packed {row['ours'] / row['packed']:.3f}"
            + f" of gemms {row['ours'] / row['gemms']:.3f}",
            flush=True,
        )
    return results


@torch.no_grad()
def kernels(wanted: list[str]) -> dict[str, object]:
    """Microseconds a layer of each kernel of our stack, from a profile of plain launches."""
    results: dict[str, object] = {}
    for name, size, lengths in workloads(wanted):
        layers = SIZES[size][0]
        _, _, ours, _ = encoder_inputs(size, lengths, torch.float16)
        graph = graphed(ours)
        graph.replay()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                sums[event.name] = sums.get(event.name, 0.0) + event.device_time / 5 / layers
        ranked = dict(sorted(sums.items(), key=lambda item: -item[1]))
        results[name] = ranked
        print(name)
        for kernel, us in list(ranked.items())[:9]:
            print(f"   {us:8.2f} us a layer  {kernel[:150]}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["encoder", "kernels"])
    parser.add_argument("workloads", nargs="*", help="texts that a workload's name must contain")
    parser.add_argument("--library", help="default: as ft_handler finds it")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    if given.library:
        os.environ["FT_HANDLER_LIBRARY"] = given.library
    from ft_handler import load_library, tune

    load_library()
    tune.load_table()
    results = encoder(given.workloads) if given.what == "encoder" else kernels(given.workloads)
    if given.output:
        given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
