"""Measures the GEMM plans of a model on the running GPU.

A plan computes one linear layer for one class of token counts: one of this project's kernels or a
cuBLASLt algorithm. Plans are compared inside an encoder stack, since neighbours in a chain change
what a kernel costs. Without a table the library estimates (sm_90) or takes cuBLASLt's first guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ft_handler.tuning.table import Entry, gemm_ops, load_entry

EPS = 1e-12
# Plans of one layer that are measured, best guesses first.
MOST_OURS = 12
MOST_THEIRS = 4
LIBRARY_CHOICE = "cublaslt"


@dataclass(frozen=True)
class Layer:
    """One kind of linear layer: `[rows,k] -> [rows,n]` and what its epilogue does."""

    n: int
    k: int
    gelu: bool = False
    norm: bool = False  # bias, residual and layer norm


def layers_of(hidden: int, intermediate: int) -> list[Layer]:
    """The four linear layers of an encoder layer."""
    return [
        Layer(3 * hidden, hidden),
        Layer(hidden, hidden, norm=True),
        Layer(intermediate, hidden, gelu=True),
        Layer(hidden, intermediate, norm=True),
    ]


def row_classes(largest: int) -> list[int]:
    """Every class of token counts up to the one that holds `largest`, ascending."""
    ops = gemm_ops()
    classes = [int(ops.gemm_row_class(1))]
    while classes[-1] < largest:
        classes.append(int(ops.gemm_row_class(classes[-1] + 1)))
    return classes


def _encoder(
    hidden: int, intermediate: int, heads: int, rows: int, dtype: str, depth: int
) -> Callable[[], object]:
    """A stack of `depth` random layers over `rows` tokens, as a call."""
    import torch

    from ft_handler.model.encoder import WEIGHTS
    from ft_handler.model.spec import EncoderSpec

    ops = gemm_ops()
    kind = getattr(torch, dtype)
    spec = EncoderSpec(
        hidden_size=hidden,
        embedding_size=hidden,
        num_layers=depth,
        num_heads=heads,
        intermediate_size=intermediate,
        activation="gelu",
        layer_norm_eps=EPS,
    ).text(WEIGHTS)
    vocabulary, positions = 1000, 512

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").mul_(scale).to(kind)

    def norm(*shape: int) -> list[torch.Tensor]:
        return [random(*shape, scale=0.1) + 1, random(*shape, scale=0.1)]

    def linear(n: int, k: int) -> list[torch.Tensor]:
        return [random(depth, n, k, scale=k**-0.5), random(depth, n, scale=0.1)]

    tables = [random(count, hidden, scale=1.0) for count in (vocabulary, positions, 2)]
    parameters = [
        *tables,
        *norm(hidden),
        *linear(3 * hidden, hidden),
        *linear(hidden, hidden),
        *norm(depth, hidden),
        *linear(intermediate, hidden),
        *linear(hidden, intermediate),
        *norm(depth, hidden),
    ]
    ids = torch.randint(vocabulary, (rows,), device="cuda")
    types = torch.zeros_like(ids)
    edges = [*range(0, rows, 128), rows]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")

    def run() -> object:
        # The path for few tokens has no plans; where it is not taken, they matter.
        return ops.encode(
            ids, types, None, cu_seqlens, min(rows, 128), parameters, spec, "few_tokens=0"
        )

    return run


def _replay_times(graphs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median microseconds of each graph, replayed in turn so that a drift hits all of them."""
    import torch

    cuda: Any = torch.cuda  # parts of it carry no types
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        pairs = []
        for name, graph in graphs.items():
            start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            stop.record()
            pairs.append((name, start, stop))
        cuda.synchronize()
        for name, start, stop in pairs:
            times[name].append(start.elapsed_time(stop) * 1e3)
    return {name: sorted(t)[rounds // 2] for name, t in times.items()}


def measure(
    hidden: int, intermediate: int, heads: int, rows: int, dtype: str, library: bool = True
) -> list[Entry]:
    """Find the fastest plans of an encoder's four layers at one class of token counts.

    Coordinate descent on the current GPU: starting from the estimates' choice, each layer in turn
    takes the plan that makes a stack of a few layers, in a CUDA graph, fastest; twice.

    library  whether cuBLASLt's single algorithms take part, which binds the plans to its version;
             its own choice always does
    """
    import torch

    cuda: Any = torch.cuda
    ops = gemm_ops()
    device = cuda.current_device()
    rows = int(ops.gemm_row_class(rows))
    # Deep enough that weights come from memory, not from the cache.
    depth = 6 if rows <= 2048 else 3
    run = _encoder(hidden, intermediate, heads, rows, dtype, depth)
    layers = layers_of(hidden, intermediate)

    def load(layer: Layer, plan: str, us: float = 0.0) -> Entry:
        entry = Entry(dtype, rows, layer.n, layer.k, layer.gelu, layer.norm, plan, round(us, 2))
        load_entry(device, entry)
        return entry

    def candidates(layer: Layer) -> list[str]:
        weight = torch.empty(layer.n, layer.k, dtype=getattr(torch, dtype), device="cuda")
        plans = ops.gemm_candidates(weight, rows, layer.gelu, layer.norm, layer.norm).split("\n")
        ours = [plan for plan in plans if plan.startswith("sm90:")][:MOST_OURS]
        theirs = [plan for plan in plans if not plan.startswith("sm90:")][:MOST_THEIRS]
        return [*ours, LIBRARY_CHOICE, *(theirs if library else [])]

    pool = cuda.graph_pool_handle()

    def captured() -> Any:
        graph = cuda.CUDAGraph()
        run()  # what a kernel's first launch sets up must not happen in a capture
        with cuda.graph(graph, pool=pool):
            run()
        return graph

    left = {layer: candidates(layer) for layer in layers}
    best = {layer: plans[0] for layer, plans in left.items()}
    for layer, plan in best.items():
        load(layer, plan)
    us = 0.0
    for _ in range(2):
        for layer in layers:
            graphs = {}
            for plan in left[layer]:
                load(layer, plan)
                graphs[plan] = captured()
            times = _replay_times(graphs, 3 if rows > 8192 else 7)
            ranked = sorted(left[layer], key=times.__getitem__)
            # A difference below the noise is no reason to move.
            if times[ranked[0]] < 0.995 * times[best[layer]]:
                best[layer] = ranked[0]
            us = times[best[layer]] / depth
            left[layer] = [best[layer], *(p for p in ranked if p != best[layer])][:3]
            load(layer, best[layer])
    return [load(layer, plan, us) for layer, plan in best.items()]
