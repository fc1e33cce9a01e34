"""`ft-handler serve`: TorchServe in the foreground."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ft_handler.servers.torchserve.properties import ServeOptions


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
    exporter_port: Annotated[
        int | None,
        typer.Option(
            help="Port of a Prometheus endpoint with what waits and which workers are ready, on "
            "the host of the metrics (docs/metrics.md). Default: none.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until all workers must be READY.")] = 300,
) -> None:
    """Run TorchServe in the foreground until Ctrl-C."""
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
    raise typer.Exit(run(options, timeout, exporter_port))


def run(options: ServeOptions, timeout: float, exporter_port: int | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; the process's exit code."""
    from rich.console import Console

    from ft_handler.servers.torchserve.exporter import Exporter
    from ft_handler.servers.torchserve.process import Server
    from ft_handler.servers.torchserve.properties import shown as address_of

    # highlight=False: addresses must survive copy and paste from a narrow terminal.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    server = Server(options)
    asked = threading.Event()

    def on_signal(number: int, _frame: object) -> None:
        if asked.is_set():
            return  # already stopping
        asked.set()
        raise KeyboardInterrupt

    exporter = None if exporter_port is None else Exporter.of(server, exporter_port)
    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        console.print(f"Java {server.java.version} from {server.java.origin} ({server.java.path})")
        if exporter is not None:
            exporter.start()
        server.start()
        with console.status("starting TorchServe") as status:

            def show(done: Sequence[str], waiting: Sequence[str]) -> None:
                status.update(f"{len(done)} of {len(done) + len(waiting)} models ready")

            seconds = server.wait_ready(timeout, show)
        names = server.registered()
        console.print(f"ready after {seconds:.1f} s: {', '.join(names) or 'no model registered'}")
        for name in names:
            path = f"/predictions/{name}"
            console.print(
                f"  predict     {address_of('inference_address', server.inference, path)}"
            )
        console.print(f"  management  {server.management}/models")
        console.print(f"  metrics     {address_of('metrics_address', server.metrics, '/metrics')}")
        if exporter is not None:
            console.print(f"  exporter    {exporter.address}/metrics")
        console.print(
            f"  token       keys are in {server.key_file}: -H 'Authorization: Bearer KEY'"
            if server.token_auth
            else "  token       none needed (--no-token-auth)"
        )
        console.print("Ctrl-C stops the server")
        code = server.wait()
        console.print(f"TorchServe ended by itself with code {code}", style="red")
        return code or 1
    except KeyboardInterrupt:
        console.print("stopping")
        return 0
    finally:
        asked.set()
        server.stop()
        if exporter is not None:
            exporter.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
