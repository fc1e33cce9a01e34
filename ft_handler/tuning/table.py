"""Tables of GEMM plans: reading, writing and handing them to the library.

A table is JSON, good for one GPU model and, where it names cuBLASLt algorithms, for one cuBLASLt
version; entries of another version are refused when the table is loaded. For some GPU models a
table comes with the package.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_handler.config import environment
from ft_handler.errors import EnvironmentProblem, LibraryError

FORMAT = 1
VARIABLE = "FT_HANDLER_TUNE"
HALF = ("float16", "bfloat16")
NARROW = "float8_e4m3fn"


@dataclass(frozen=True)
class Entry:
    """A layer's plan in the fastest chain for one class of token counts.

    dtype  of the weight; NARROW: of the inputs too, and what comes out is float16
    us     microseconds of one encoder layer, all its kernels, in that chain
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
    return Path(__file__).parent / f"gemm-{_slug(gpu)}.json"


def gemm_ops() -> Any:
    import torch

    from ft_handler.native.library import NAMESPACE, load_library

    load_library()
    ops = getattr(torch.ops, NAMESPACE)
    if not hasattr(ops, "load_gemm_plan"):
        raise LibraryError(
            "the library was built without CUDA; build with FT_HANDLER_CUDA=1 where nvcc is"
        )
    return ops


def load_entry(device: int, entry: Entry) -> None:
    gemm_ops().load_gemm_plan(
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
    """Write a table, or replace one; entries of other shapes in an existing table stay.

    Raises EnvironmentProblem when the existing file is no table, or one of another GPU.
    """
    kept: dict[tuple[object, ...], dict[str, object]] = {}
    old = []
    if path.exists():
        table = read_table(path)
        if table["gpu"] != gpu:
            raise EnvironmentProblem(
                f"{path}: measured on {table['gpu']}, and this is {gpu}; name another file"
            )
        old = table["entries"]
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

    The package's own table for the GPU comes first, if there is one. What it has of a half
    precision is for both of them: they cost the tensor cores the same. Then `path`, without which:
    $FT_HANDLER_TUNE, else the GPU's default place, else nothing. Later entries replace earlier.
    Raises EnvironmentProblem when the table is for another GPU or another cuBLASLt.
    """
    import torch

    gpu = torch.cuda.get_device_name(device)
    count = 0
    if shipped_path(gpu).exists():
        for raw in read_table(shipped_path(gpu))["entries"]:
            for dtype in HALF if raw["dtype"] in HALF else (raw["dtype"],):
                # A library built elsewhere may lack a kernel; its own choice serves then.
                with contextlib.suppress(RuntimeError):
                    load_entry(device, Entry(**{**raw, "dtype": dtype}))
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
            load_entry(device, Entry(**raw))
        except (RuntimeError, TypeError) as error:
            raise EnvironmentProblem(f"{named}: {error}") from None
    return count + len(table["entries"])
