"""`ft-handler playground`: a page in the browser that asks a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def playground_command(
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The server's inference address. Default: that of the settings."
        ),
    ] = None,
    management: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where models are listed. Default: the port after."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where metrics are. Default: the port after that."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The server's settings. Default: config.properties here, if any."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="TorchServe's key file, or a file with a key in it. Default: key_file.json here, "
            "if any."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(help="The page's port on 127.0.0.1; 0 is a free one.")
    ] = 8090,
) -> None:
    """Show a page, on this machine alone, that asks a running server, until Ctrl-C."""
    from ft_handler.playground.local import Playground
    from ft_handler.playground.upstream import configured, named
    from ft_handler.servers.torchserve.api import KEY_FILE

    if config is None and Path("config.properties").exists():
        config = Path("config.properties")
    if key_file is None:
        key_file = Path(KEY_FILE)
    elif not key_file.is_file():
        raise typer.BadParameter(f"there is no file {key_file}.", param_hint="'--key-file'")
    if server is not None:
        upstream = named(server, management, metrics, key_file)
    elif management is None and metrics is None:
        upstream = configured(config, key_file)
    else:
        raise typer.BadParameter("goes with --server alone.", param_hint="'--management/--metrics'")
    with Playground(upstream, port) as page:
        typer.echo(f"{page.url} asks {upstream.inference}; Ctrl-C stops the page")
        page.serve_forever()
