"""`ft-handler verify`: a traced file held against transformers on one's own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_handler.cli.choices import choice
from ft_handler.config import DEVICES
from ft_handler.verify.data import FORMATS, Layout

if TYPE_CHECKING:
    from ft_handler.verify.run import Report, VerifyOptions


def verify_command(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What `ft-handler trace` wrote: its folder or file."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Examples: TSV, CSV, SQuAD's JSON, JSON lines, CoNLL, or plain texts; .gz too.",
        ),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            help="What was traced, a hub name or a folder. Default: what the traced file records.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="The LoRA adapter that was merged in.")
    ] = None,
    cache_dir: Annotated[
        str | None, typer.Option("--cache-dir", help="Where hub downloads are kept.")
    ] = None,
    format: Annotated[
        str | None,
        choice("--format", names=list(FORMATS), help="Of the data. Default: by the file's name."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            help="The columns of a table in order, such as text,-,label; - leaves one out. "
            "Default: the first line names them.",
        ),
    ] = None,
    skip: Annotated[
        int, typer.Option("--skip", min=0, help="Lines to leave out at the beginning of a table.")
    ] = 0,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="The model's labels in their order as the data names them, with commas; for "
            "zero-shot classification the candidates. Default: the model's, or the data's.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Take so many examples from the beginning.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Examples that are computed together.")
    ] = 16,
    device: Annotated[
        str, choice("--device", names=DEVICES, help="auto takes a GPU where there is one.")
    ] = "auto",
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0, help="Points of 100 that a metric may be below transformers'."
        ),
    ] = 0.5,
    most_different: Annotated[
        str,
        typer.Option(
            "--most-different", help="Answers that may differ, as a number or a share such as 1%."
        ),
    ] = "1%",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Hold a traced file against transformers' model on your own data.

    The exit status is 1 when a metric or the answers are worse than is allowed.
    """
    from ft_handler.verify.run import VerifyOptions

    report = _run(
        VerifyOptions(
            source=directory,
            data=data,
            checkpoint=checkpoint,
            adapter=adapter,
            cache_dir=cache_dir,
            layout=Layout(format, _parts(columns), skip),
            labels=_parts(labels),
            limit=limit,
            batch_size=batch_size,
            device=device,
            tolerance=tolerance,
            most_different=most_different,
        )
    )
    if as_json:
        typer.echo(json.dumps(report.document(), indent=1))
    else:
        _show(report)
    raise typer.Exit(1 if report.failures else 0)


def _parts(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _run(options: VerifyOptions) -> Report:
    """The report; steps and progress go to standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from ft_handler.verify.run import verify

    console = Console(stderr=True, highlight=False)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("verifying", total=None)
        return verify(
            options,
            lambda line: progress.console.print(line, markup=False, soft_wrap=True),
            lambda done, total: progress.update(bar, completed=done, total=total),
        )


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{report.task}, {report.data_type}, on {report.device}: {report.examples} examples"
        + (f", {report.refused} refused" if report.refused else "")
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("traced", "transformers", "difference"):
        table.add_column(title, justify="right")
    ours, theirs = report.traced, report.transformers
    for name, value in ours.metrics.items():
        other = theirs.metrics[name]
        table.add_row(name, f"{value:.2f}", f"{other:.2f}", f"{value - other:+.2f}")
    table.add_row("tokens computed", f"{ours.tokens:,}", f"{theirs.tokens:,}")
    table.add_row("seconds", f"{ours.seconds:.1f}", f"{theirs.seconds:.1f}")
    console.print(table)
    console.print(
        f"{report.different} answers differ; outputs differ by {report.largest_difference:.1e} at "
        f"most, {report.mean_difference:.1e} on average",
        soft_wrap=True,
    )
    for name, value in report.agreement.items():
        console.print(f"{name.replace('_', ' ')}: {value:.6g}")
    for failure in report.failures:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    if not report.failures:
        console.print("passed")
