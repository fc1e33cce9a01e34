"""The `ft-handler` command: its commands put together, and how their errors are shown."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from ft_handler.cli.archive import archive_command
from ft_handler.cli.bench import bench_commands
from ft_handler.cli.doctor import doctor_command
from ft_handler.cli.handler_path import handler_path_command
from ft_handler.cli.inspect import inspect_command
from ft_handler.cli.playground import playground_command
from ft_handler.cli.predict import predict_command
from ft_handler.cli.ready import ready_command
from ft_handler.cli.serve import serve_command
from ft_handler.cli.trace import trace_command
from ft_handler.cli.tune import tune_command
from ft_handler.cli.verify import verify_command
from ft_handler.errors import FtHandlerError
from ft_handler.version import __version__

#: In the order of the help; a function's docstring is its help.
COMMANDS: dict[str, Callable[..., None]] = {
    "trace": trace_command,
    "archive": archive_command,
    "handler-path": handler_path_command,
    "serve": serve_command,
    "ready": ready_command,
    "playground": playground_command,
    "predict": predict_command,
    "verify": verify_command,
    "inspect": inspect_command,
    "tune": tune_command,
    "doctor": doctor_command,
}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ft-handler {__version__}")
        raise typer.Exit


def _root(
    _debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Trace, archive and serve padding-free encoders: BERT and its kin."""


def build() -> typer.Typer:
    """The application: every command, and typer's own shell completion."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_root)
    for name, command in COMMANDS.items():
        app.command(name)(command)
    app.add_typer(
        bench_commands(), name="bench", help="Benchmarks, from a clone of the repository."
    )
    return app


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one clear line for an error, a traceback only with --debug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    try:
        build()(args=given, prog_name="ft-handler")
    except FtHandlerError as error:
        _fail(str(error), debug)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        _fail(f"{type(error).__name__}: {error} (--debug shows the traceback)", debug)


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise SystemExit(1)
