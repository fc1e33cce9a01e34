"""`ft-handler tune`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_handler import precisions
from ft_handler.config import environment
from ft_handler.errors import EnvironmentProblem

if TYPE_CHECKING:
    from ft_handler.precisions import Precision
    from ft_handler.tuning.table import Entry

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
    """Measure GEMM candidates on this GPU and keep the fastest in a table.

    Ctrl-C ends it after the token count that is being measured; the table keeps what was measured.
    """
    import torch

    from ft_handler.model.bundle import read_info
    from ft_handler.tuning.measure import measure, row_classes
    from ft_handler.tuning.table import VARIABLE, default_path, gemm_ops

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
    dtype = _weight_dtype(precisions.get(info.data_type), info.hidden_size)
    typer.echo(
        f"tuning {info.hidden_size} columns, {info.intermediate_size} in between, {dtype}, on "
        f"{gpu}: {len(classes)} token counts, {classes[0]:,} to {classes[-1]:,}"
    )

    def measured(rows: int) -> list[Entry]:
        return measure(
            info.hidden_size, info.intermediate_size, info.num_heads, rows, dtype, library
        )

    if not _tune(classes, measured, path, gpu):
        raise typer.Exit(130)


def _weight_dtype(precision: Precision, hidden_size: int) -> str:
    """torch's name of the type that the products of such a file have on this GPU."""
    import torch

    from ft_handler.tuning.table import NARROW, gemm_ops

    if precision.product_dtype != getattr(torch, NARROW):
        return precision.torch_name
    like = torch.empty(hidden_size, hidden_size, dtype=precision.dtype, device="cuda")
    return NARROW if gemm_ops().serves_narrow(like) else precision.torch_name


def _tune(classes: list[int], measure: Callable[[int], list[Entry]], path: Path, gpu: str) -> bool:
    """Measure one class of token counts after the other; whether none was left out.

    What was measured is in the table at once, so that nothing is lost whatever ends this.
    """
    from rich import progress as bars
    from rich.console import Console

    from ft_handler.tuning.table import write_table

    console = Console(highlight=False)
    write_table(path, gpu, [])  # a file that cannot be written is said before minutes of measuring
    done = plans = 0
    began = time.monotonic()
    progress = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=2,  # drawing takes time from what queues the kernels that are timed
    )
    notice = "stopping after this token count; Ctrl-C again stops at once"
    with _interrupts(lambda: console.print(notice)) as interrupted, progress:
        bar = progress.add_task("", total=len(classes))
        try:
            for rows in classes:
                if interrupted():
                    break
                progress.update(bar, description=f"{rows:,} tokens")
                found = measure(rows)
                write_table(path, gpu, found)
                done, plans = done + 1, plans + len(found)
                progress.advance(bar)
                line = f"{rows:6d} tokens: {found[0].us:8.2f} us a layer  " + ", ".join(
                    entry.plan.removeprefix("sm90:")[:24] for entry in found
                )
                if not console.is_terminal:
                    left = (time.monotonic() - began) / done * (len(classes) - done)
                    line += f"  ({done} of {len(classes)}, {left:.0f} s left)"
                console.print(line, markup=False, soft_wrap=True)
        finally:
            progress.stop()
            stopped = f"stopped, {done} of {len(classes)} token counts are measured: "
            console.print(
                f"{stopped if done < len(classes) else ''}{plans} plans written to {path}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
    return done == len(classes)


@contextlib.contextmanager
def _interrupts(tell: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which `tell` is told; the second one ends the process as ever.

    The first must not hit the capture of a graph: what that raises instead is anyone's guess.
    """
    pressed = False

    def press(_number: int, _frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)
        tell()

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
