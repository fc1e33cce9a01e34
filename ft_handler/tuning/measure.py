"""Measures the GEMM plans of a model on the running GPU.

A plan computes one linear layer for one class of token counts: one of this project's kernels or a
cuBLASLt algorithm. Plans are compared inside an encoder stack, since neighbours in a chain change
what a kernel costs. Without a table the library estimates (sm_90) or takes cuBLASLt's first guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_handler.tuning.table import NARROW, Entry, gemm_ops, load_entry

if TYPE_CHECKING:
    from ft_handler.model.encoder import Encoder

EPS = 1e-12
VOCABULARY, POSITIONS = 1000, 512
# Tokens of a sequence.
LONGEST = 128
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


def random_encoder(
    hidden: int, intermediate: int, heads: int, depth: int, dtype: str, device: str = "cuda"
) -> Encoder:
    """A stack of `depth` random layers; NARROW: products in e4m3, everything else in fp16."""
    import torch

    from ft_handler.model.encoder import PRODUCTS, TABLES, Encoder
    from ft_handler.model.spec import EncoderSpec
    from ft_handler.native.twins import LARGEST_NARROW

    narrow = dtype == NARROW
    kind = torch.float16 if narrow else getattr(torch, dtype)
    spec = EncoderSpec(
        hidden_size=hidden,
        embedding_size=hidden,
        num_layers=depth,
        num_heads=heads,
        intermediate_size=intermediate,
        activation="gelu",
        layer_norm_eps=EPS,
    )

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, device=device).mul_(scale).to(kind)

    def norm(name: str, *shape: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": random(*shape, scale=0.1) + 1,
            f"{name}.bias": random(*shape, scale=0.1),
        }

    def product(name: str, layer: Layer) -> dict[str, torch.Tensor]:
        weight = random(depth, layer.n, layer.k, scale=layer.k**-0.5)
        bias = {f"{name}.bias": random(depth, layer.n, scale=0.1)}
        if not narrow:
            return {f"{name}.weight": weight, **bias}
        scale = weight.float().abs().amax(-1) / LARGEST_NARROW
        rounded = (weight.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
        return {
            f"{name}.weight": rounded,
            f"{name}.scale": scale,
            f"{name}.kept": weight[:0],
            # For inputs of up to 22, which is more than any of these products gets.
            f"{name}.input_scale": torch.full((depth,), 22 / LARGEST_NARROW, device=device),
            **bias,
        }

    layers = dict(zip(PRODUCTS[:4], layers_of(hidden, intermediate), strict=True))
    weights = {
        name: random(rows, hidden, scale=1.0)
        for name, rows in zip(TABLES, (VOCABULARY, POSITIONS, 2), strict=True)
    }
    weights |= norm("embeddings.norm", hidden)
    for name in ("layers.norm1", "layers.norm2"):
        weights |= norm(name, depth, hidden)
    for name, layer in layers.items():
        weights |= product(name, layer)
    encoder = Encoder(spec, weights, dict.fromkeys(layers, ()) if narrow else None)
    # The path for few tokens has no plans; where it is not taken, they matter.
    encoder.configure("few_tokens=0")
    return encoder


def _stack(encoder: Encoder, rows: int) -> Callable[[], object]:
    """The encoder over `rows` tokens, as a call."""
    import torch

    ids = torch.randint(VOCABULARY, (rows,), device="cuda")
    types = torch.zeros_like(ids)
    edges = [*range(0, rows, LONGEST), rows]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")

    def run() -> object:
        return encoder(ids, types, None, cu_seqlens, min(rows, LONGEST))

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
    hidden: int,
    intermediate: int,
    heads: int,
    rows: int,
    dtype: str,
    library: bool = True,
    tell: Callable[[Layer, dict[str, float]], None] = lambda layer, us: None,
) -> list[Entry]:
    """Find the fastest plans of an encoder's four layers at one class of token counts.

    Coordinate descent on the current GPU: starting from the estimates' choice, each layer in turn
    takes the plan that makes a stack of a few layers, in a CUDA graph, fastest; twice.

    dtype    of the products' weights; NARROW: e4m3, and everything else is fp16
    library  whether cuBLASLt's single algorithms take part, which binds the plans to its version;
             its own choice always does, but for NARROW, which it has no products for
    tell     gets every plan's microseconds a layer when a layer's plans are compared
    """
    import torch

    cuda: Any = torch.cuda
    ops = gemm_ops()
    device = cuda.current_device()
    rows = int(ops.gemm_row_class(rows))
    # Deep enough that weights come from memory, not from the cache.
    depth = 6 if rows <= 2048 else 3
    run = _stack(random_encoder(hidden, intermediate, heads, depth, dtype), rows)
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
        if dtype == NARROW:
            return ours
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
            tell(layer, {plan: time / depth for plan, time in times.items()})
            ranked = sorted(left[layer], key=times.__getitem__)
            # A difference below the noise is no reason to move.
            if times[ranked[0]] < 0.995 * times[best[layer]]:
                best[layer] = ranked[0]
            us = times[best[layer]] / depth
            left[layer] = [best[layer], *(p for p in ranked if p != best[layer])][:3]
            load(layer, best[layer])
    return [load(layer, plan, us) for layer, plan in best.items()]
