"""`ft-handler archive`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def archive_command(
    directory: Annotated[Path, typer.Argument(help="The folder that `ft-handler trace` wrote.")],
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", "--model_name", help="Default: the folder's name."),
    ] = None,
    version: Annotated[
        str,
        typer.Option(
            "--version",
            help="The model's version; it is in the file's name unless it is 1.0.",
        ),
    ] = "1.0",
    export_path: Annotated[
        Path,
        typer.Option("--export-path", "--export_path", help="Where to put it; made when missing."),
    ] = Path("model_store"),
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an archive.")] = False,
    library: Annotated[
        Path | None,
        typer.Option("--library", help="libpyt_fastertransformer.so, if not the package's own."),
    ] = None,
) -> None:
    """Pack a traced model's folder into a .mar file for TorchServe."""
    from ft_handler.servers.torchserve.archive import archive

    made = archive(directory, model_name, version, export_path, force, library)
    typer.echo(f"wrote {made} ({made.stat().st_size / 2**20:.0f} MiB)")
