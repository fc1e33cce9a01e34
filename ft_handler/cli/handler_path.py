"""`ft-handler handler-path`."""

from __future__ import annotations

import typer


def handler_path_command() -> None:
    """Print the handler file that torch-model-archiver's --handler takes."""
    from ft_handler.servers.torchserve.archive import handler_path

    typer.echo(handler_path())
