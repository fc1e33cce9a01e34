"""`ft-handler tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ft_handler import precisions
from ft_handler.config import environment
from ft_handler.errors import EnvironmentProblem

LARGEST = 16384


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

    from ft_handler.model.bundle import read_info
    from ft_handler.tuning.measure import measure, row_classes
    from ft_handler.tuning.table import VARIABLE, default_path, gemm_ops, write_table

    if not torch.cuda.is_available():
        raise EnvironmentProblem("tuning needs a GPU, and torch sees none")
    info = read_info(model)
    ops = gemm_ops()
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
    dtype = precisions.get(info.data_type).torch_name
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
