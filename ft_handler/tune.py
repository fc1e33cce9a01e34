"""Measures the GEMM plans of a model on the running GPU and keeps the fastest in a table.

A plan computes one linear layer for one class of token counts: one of this project's kernels or a
cuBLASLt algorithm. Plans are compared inside an encoder stack, since neighbours in a chain change
what a kernel costs. Without a table the library estimates (sm_90) or takes cuBLASLt's first guess.
The table is JSON, good for one GPU model and, where it names cuBLASLt algorithms, for one cuBLASLt
version; entries of another version are refused when the table is loaded. For some GPU models a
table comes with the package.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_handler.config import environment, leave_out_few_token_encoder
from ft_handler.errors import EnvironmentProblem, LibraryError

FORMAT = 1
VARIABLE = "FT_HANDLER_TUNE"
LARGEST = 16384
EPS = 1e-12
HALF = ("float16", "bfloat16")
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


@dataclass(frozen=True)
class Entry:
    """A layer's plan in the fastest chain for one class of token counts.

    us  microseconds of one encoder layer, all its kernels, in that chain
    """

    dtype: str
    rows: int
    n: int
    k: int
    gelu: bool
    norm: bool
    plan: str
    us: float


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def default_path(gpu: str) -> Path:
    """Where a GPU's table lives: `~/.cache/ft_handler/tuning/<gpu>.json`."""
    return Path.home() / ".cache" / "ft_handler" / "tuning" / f"{_slug(gpu)}.json"


def shipped_path(gpu: str) -> Path:
    """Where the package keeps a GPU's table, if it has one."""
    return Path(__file__).parent / "data" / f"gemm-{_slug(gpu)}.json"


def layers_of(hidden: int, intermediate: int) -> list[Layer]:
    """The four linear layers of an encoder layer."""
    return [
        Layer(3 * hidden, hidden),
        Layer(hidden, hidden, norm=True),
        Layer(intermediate, hidden, gelu=True),
        Layer(hidden, intermediate, norm=True),
    ]


def row_classes(largest: int = LARGEST) -> list[int]:
    """Every class of token counts up to the one that holds `largest`, ascending."""
    ops = _ops()
    classes = [int(ops.gemm_row_class(1))]
    while classes[-1] < largest:
        classes.append(int(ops.gemm_row_class(classes[-1] + 1)))
    return classes


def _ops() -> Any:
    import torch

    from ft_handler._lib import NAMESPACE, load_library

    load_library()
    ops = getattr(torch.ops, NAMESPACE)
    if not hasattr(ops, "load_gemm_plan"):
        raise LibraryError(
            "the library was built without CUDA; build with FT_HANDLER_CUDA=1 where nvcc is"
        )
    return ops


def _encoder(
    hidden: int, intermediate: int, heads: int, rows: int, dtype: str, depth: int
) -> Callable[[], object]:
    """A stack of `depth` random layers over `rows` tokens, as a call."""
    import torch

    ops = _ops()
    kind = getattr(torch, dtype)
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
        return ops.encoder(ids, types, None, cu_seqlens, min(rows, 128), *parameters, heads, EPS)

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
    ops = _ops()
    device = cuda.current_device()
    rows = int(ops.gemm_row_class(rows))
    # Deep enough that weights come from memory, not from the cache.
    depth = 6 if rows <= 2048 else 3
    run = _encoder(hidden, intermediate, heads, rows, dtype, depth)
    layers = layers_of(hidden, intermediate)

    def load(layer: Layer, plan: str, us: float = 0.0) -> Entry:
        entry = Entry(dtype, rows, layer.n, layer.k, layer.gelu, layer.norm, plan, round(us, 2))
        _load(device, entry)
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


def _load(device: int, entry: Entry) -> None:
    _ops().load_gemm_plan(
        device,
        entry.dtype,
        entry.rows,
        entry.n,
        entry.k,
        entry.gelu,
        entry.norm,
        entry.norm,
        entry.plan,
    )


def write_table(path: Path, gpu: str, entries: Iterable[Entry]) -> None:
    """Write a table, or replace one; entries of other shapes in an existing table stay."""
    kept: dict[tuple[object, ...], dict[str, object]] = {}
    old = read_table(path)["entries"] if path.exists() else []
    for entry in [*old, *(asdict(e) for e in entries)]:
        kept[tuple(entry[name] for name in ("dtype", "rows", "n", "k", "gelu", "norm"))] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(
        f'{{"format": {FORMAT}, "gpu": {json.dumps(gpu)}, "entries": [\n'
        + ",\n".join(json.dumps(entry) for entry in kept.values())
        + "\n]}\n"
    )
    fresh.replace(path)


def read_table(path: Path) -> dict[str, Any]:
    """Read a table; raises EnvironmentProblem in words."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{path}: not a GEMM table: {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise EnvironmentProblem(f"{path}: not a GEMM table of format {FORMAT}; tune again")
    return table


def load_table(path: Path | None = None, device: int = 0) -> int:
    """Make a table's plans the choice on `device`; returns how many.

    The package's own table for the GPU comes first, if there is one, for both half precisions:
    they cost the tensor cores the same. Then `path`, without which: $FT_HANDLER_TUNE, else the
    GPU's default place, else nothing. Later entries replace earlier.
    Raises EnvironmentProblem when the table is for another GPU or another cuBLASLt.
    """
    import torch

    gpu = torch.cuda.get_device_name(device)
    count = 0
    if shipped_path(gpu).exists():
        for raw, dtype in itertools.product(read_table(shipped_path(gpu))["entries"], HALF):
            # A library built elsewhere may lack a kernel; its own choice serves then.
            with contextlib.suppress(RuntimeError):
                _load(device, Entry(**{**raw, "dtype": dtype}))
                count += 1
    named = path or (Path(environment(VARIABLE) or "") if environment(VARIABLE) else None)
    if named is None:
        named = default_path(gpu)
        if not named.exists():
            return count
    table = read_table(named)
    if table["gpu"] != gpu:
        raise EnvironmentProblem(f"{named}: measured on {table['gpu']}, and this is {gpu}")
    for raw in table["entries"]:
        try:
            _load(device, Entry(**raw))
        except (RuntimeError, TypeError) as error:
            raise EnvironmentProblem(f"{named}: {error}") from None
    return count + len(table["entries"])


def tune_command(
    model: Annotated[
        Path, typer.Option("--model", help="A traced file; its shapes and dtype are tuned.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The table. Default: $FT_HANDLER_TUNE, else ~/.cache/ft_handler/tuning/GPU.json."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Token counts to tune for, comma-separated. Default: every class."),
    ] = None,
    largest: Annotated[
        int, typer.Option(min=1, help="Most tokens of a batch, when --tokens is not given.")
    ] = LARGEST,
    library: Annotated[
        bool,
        typer.Option(
            help="Let cuBLASLt's single algorithms take part; binds the table to its version."
        ),
    ] = True,
) -> None:
    """Measure GEMM candidates on this GPU and keep the fastest in a table."""
    import torch

    from ft_handler.model import DATA_TYPES, read_info

    if not torch.cuda.is_available():
        raise EnvironmentProblem("tuning needs a GPU, and torch sees none")
    info = read_info(model)
    # The path for few tokens has no plans; where it is not taken, they matter.
    leave_out_few_token_encoder()
    ops = _ops()
    if tokens:
        try:
            wanted = [int(t) for t in tokens.split(",")]
        except ValueError:
            raise typer.BadParameter("--tokens takes numbers, comma-separated") from None
        classes = sorted({int(ops.gemm_row_class(t)) for t in wanted})
    else:
        classes = row_classes(largest)
    gpu = torch.cuda.get_device_name()
    named = environment(VARIABLE)
    path = output or (Path(named) if named else default_path(gpu))
    dtype = str(DATA_TYPES[info.data_type]).removeprefix("torch.")
    entries = []
    for rows in classes:
        found = measure(
            info.hidden_size, info.intermediate_size, info.num_heads, rows, dtype, library
        )
        entries += found
        plans = ", ".join(entry.plan.removeprefix("sm90:")[:24] for entry in found)
        typer.echo(f"{rows:6d} tokens: {found[0].us:8.2f} us a layer  {plans}")
    write_table(path, gpu, entries)
    typer.echo(f"{len(entries)} plans written to {path}")
