"""Measures the GEMM plans of a model on the running GPU and keeps the fastest in a table.

A plan computes one linear layer for one class of token counts: one of this project's kernels or a
cuBLASLt algorithm. Without a table the library estimates (sm_90) or takes cuBLASLt's first guess.
The table is JSON, good for one GPU model and, where it names cuBLASLt algorithms, for one cuBLASLt
version; entries of another version are refused when the table is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_handler.config import environment
from ft_handler.errors import EnvironmentProblem, LibraryError

FORMAT = 1
VARIABLE = "FT_HANDLER_TUNE"
LARGEST = 16384
EPS = 1e-12


@dataclass(frozen=True)
class Layer:
    """One kind of linear layer: `[rows,k] -> [rows,n]` and what its epilogue does."""

    n: int
    k: int
    gelu: bool = False
    norm: bool = False  # bias, residual and layer norm


@dataclass(frozen=True)
class Entry:
    """The fastest plan of a layer for one class of token counts, and its microseconds."""

    dtype: str
    rows: int
    n: int
    k: int
    gelu: bool
    norm: bool
    plan: str
    us: float


def default_path(gpu: str) -> Path:
    """Where a GPU's table lives: `~/.cache/ft_handler/tuning/<gpu>.json`."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path.home() / ".cache" / "ft_handler" / "tuning" / f"{name}.json"


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


def _replay_time(body: Callable[[], None], copies: int, replays: int = 7) -> float:
    """Median microseconds of one of the `copies` calls in `body`, captured in a graph."""
    import torch

    cuda: Any = torch.cuda  # parts of it carry no types
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        body()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        body()
    times = []
    for _ in range(replays + 1):
        start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(sorted(times[1:])[replays // 2]) * 1e3 / copies


def measure(layer: Layer, rows: int, dtype: str, copies: int = 8) -> Entry:
    """Time every plan of one layer at one class of token counts on the current GPU."""
    import torch

    ops = _ops()
    kind = getattr(torch, dtype)
    device = torch.cuda.current_device()
    rows = int(ops.gemm_row_class(rows))

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").mul_(scale).to(kind)

    # Weights of their own for every call: a model finds them in memory, not in the cache.
    weights = [random(layer.n, layer.k, scale=layer.k**-0.5) for _ in range(copies)]
    x, bias, gamma, beta = random(rows, layer.k), *(random(layer.n) for _ in range(3))
    residual = random(rows, layer.n)

    def body() -> None:
        for weight in weights:
            if layer.norm:
                ops.linear_layer_norm(x, weight, bias, residual, gamma, beta, EPS)
            else:
                ops.linear(x, weight, bias, None, layer.gelu)

    plans = ops.gemm_candidates(weights[0], rows, layer.gelu, layer.norm, layer.norm).split("\n")
    timed = []
    for plan in plans:
        _load(device, Entry(dtype, rows, layer.n, layer.k, layer.gelu, layer.norm, plan, 0.0))
        timed.append((_replay_time(body, copies), plan))
    us, best = min(timed)
    entry = Entry(dtype, rows, layer.n, layer.k, layer.gelu, layer.norm, best, round(us, 2))
    _load(device, entry)
    return entry


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
        json.dumps({"format": FORMAT, "gpu": gpu, "entries": list(kept.values())}, indent=1)
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

    Without a path: $FT_HANDLER_TUNE, else the GPU's default place, else nothing is loaded (0).
    Raises EnvironmentProblem when the table is for another GPU or another cuBLASLt.
    """
    import torch

    gpu = torch.cuda.get_device_name(device)
    named = path or (Path(environment(VARIABLE) or "") if environment(VARIABLE) else None)
    if named is None:
        named = default_path(gpu)
        if not named.exists():
            return 0
    table = read_table(named)
    if table["gpu"] != gpu:
        raise EnvironmentProblem(f"{named}: measured on {table['gpu']}, and this is {gpu}")
    for raw in table["entries"]:
        try:
            _load(device, Entry(**raw))
        except (RuntimeError, TypeError) as error:
            raise EnvironmentProblem(f"{named}: {error}") from None
    return len(table["entries"])


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
) -> None:
    """Measure GEMM candidates on this GPU and keep the fastest in a table."""
    import torch

    from ft_handler.model import DATA_TYPES, read_info

    if not torch.cuda.is_available():
        raise EnvironmentProblem("tuning needs a GPU, and torch sees none")
    info = read_info(model)
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
        for layer in layers_of(info.hidden_size, info.intermediate_size):
            entries.append(measure(layer, rows, dtype))
            last = entries[-1]
            typer.echo(
                f"{rows:6d} tokens, {layer.n} x {layer.k}: {last.us:8.2f} us  {last.plan[:60]}"
            )
    write_table(path, gpu, entries)
    typer.echo(f"{len(entries)} plans written to {path}")
