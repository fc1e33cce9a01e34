"""The `ft-handler` command. What a command needs is imported when that command runs."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_handler.errors import FtHandlerError
from ft_handler.version import __version__

#: Command -> module, function, and the help line shown without importing the module.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "trace": (
        "ft_handler.cli.trace",
        "trace_command",
        "Write a traced model and everything an archive needs from a BERT checkpoint.",
    ),
    "archive": (
        "ft_handler.cli.archive",
        "archive_command",
        "Pack a traced model's folder into a .mar file for TorchServe.",
    ),
    "handler-path": (
        "ft_handler.cli.handler_path",
        "handler_path_command",
        "Print the handler file that torch-model-archiver's --handler takes.",
    ),
    "serve": (
        "ft_handler.cli.main",
        "serve_command",
        "Run TorchServe in the foreground until Ctrl-C.",
    ),
    "tune": (
        "ft_handler.cli.tune",
        "tune_command",
        "Measure GEMM candidates on this GPU and keep the fastest in a table.",
    ),
    "doctor": (
        "ft_handler.doctor",
        "doctor_command",
        "Print what a bug report needs.",
    ),
}

#: Benchmark -> its script in the repository, and its help line.
BENCHMARKS = {
    "encoder": ("encoder.py", "The encoder beside other engines, on ragged batches."),
    "serving": ("serving.py", "Requests a second and latencies through TorchServe."),
}


def serve_command(
    models: Annotated[
        list[str] | None,
        typer.Option(
            help="Archives of the store to load, comma-separated or repeated, optionally as "
            "name=file.mar; 'none' loads none. Default: every archive of the store."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TorchServe's settings. Default: config.properties here, if any."),
    ] = None,
    model_store: Annotated[
        Path | None, typer.Option(help="Folder of .mar files. Default: the config's.")
    ] = None,
    token_auth: Annotated[
        bool | None,
        typer.Option("--token-auth/--no-token-auth", help="Demand keys. Default: the config's."),
    ] = None,
    enable_model_api: Annotated[
        bool | None,
        typer.Option(
            "--enable-model-api/--disable-model-api",
            help="Let clients register and unregister models. Default: the config's.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Inference port; management is the next and metrics the one after."),
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC inference port; gRPC management is the next.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until all workers must be READY.")] = 300,
) -> None:
    """Run TorchServe in the foreground until Ctrl-C."""
    from ft_handler.cli.serve_loop import serve_command
    from ft_handler.servers.torchserve.properties import ServeOptions, sequence

    if config is None and Path("config.properties").exists():
        config = Path("config.properties")
    options = ServeOptions(
        config=config,
        model_store=model_store,
        models=sequence(models or []),
        token_auth=token_auth,
        model_api=enable_model_api,
        port=port,
        grpc_port=grpc_port,
    )
    raise typer.Exit(serve_command(options, timeout=timeout))


def benchmark_script(name: str) -> Path:
    """The script in the clone one stands in, or in the clone this package runs from."""
    from ft_handler.errors import EnvironmentProblem

    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        script = root / "benchmarks" / name
        if script.is_file():
            return script
    raise EnvironmentProblem(
        f"benchmarks/{name} is not here: benchmarks are part of the repository, run this in a clone"
    )


def _bench(script: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        import subprocess

        command = [sys.executable, str(benchmark_script(script)), *context.args]
        raise typer.Exit(subprocess.run(command).returncode)

    return run


def _not_imported() -> None:
    """Stands for a command that was not asked for; `--help` shows its name and help line."""
    raise AssertionError("only the command that was asked for is ever run")


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
    """Trace, archive and serve padding-free BERT models."""


def build(chosen: str | None) -> typer.Typer:
    """The application; of the lazy commands only `chosen` is imported."""
    settings: dict[str, Any] = {"no_args_is_help": True}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, **settings)
    app.callback()(_root)
    for name, (module, function, help_line) in COMMANDS.items():
        command = _not_imported
        if name == chosen:
            command = getattr(importlib.import_module(module), function)
        app.command(name, help=help_line)(command)
    bench = typer.Typer(**settings)
    for name, (script, help_line) in BENCHMARKS.items():
        # Everything after the name, --help included, is the script's.
        passing = {"allow_extra_args": True, "ignore_unknown_options": True}
        bench.command(name, help=help_line, context_settings={**passing, "help_option_names": []})(
            _bench(script)
        )
    app.add_typer(bench, name="bench", help="Benchmarks, from a clone of the repository.")
    return app


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one clear line for an error, a traceback only with --debug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    chosen = next((a for a in given if not a.startswith("-")), None)
    try:
        build(chosen)(args=given, prog_name="ft-handler")
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


if __name__ == "__main__":
    main()
