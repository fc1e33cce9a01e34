"""`ft-handler ready`: whether a running server can be sent requests, as an exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ft_handler.errors import EnvironmentProblem


def ready_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Models, as NAME or NAME/VERSION. Default: every registered one.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The server's settings. Default: config.properties here, if any."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="The --port that `ft-handler serve` was given.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="Where the server wrote its keys. Default: key_file.json here, if any."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which everything must be answered.")
    ] = 5,
) -> None:
    """Say by the exit status whether a server on this machine can be sent requests.

    It is 0 when all workers of the models are READY, each model has answered its task's sample, and
    the server does not drain. Otherwise it is 1, with the cause in one line.
    """
    from ft_handler.servers.torchserve.api import KEY_FILE
    from ft_handler.servers.torchserve.process import running
    from ft_handler.servers.torchserve.properties import ServeOptions, default_config
    from ft_handler.servers.torchserve.readiness import Readiness

    options = ServeOptions(config=config or default_config(), port=port)
    api = running(options, key_file or Path(KEY_FILE))
    obstacle = Readiness(api).obstacle(names or [], timeout)
    if obstacle is not None:
        raise EnvironmentProblem(obstacle)
