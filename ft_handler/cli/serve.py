"""`ft-handler serve`: TorchServe in the foreground."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ft_handler.servers.torchserve.health import Health
    from ft_handler.servers.torchserve.process import Server
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
    health_port: Annotated[
        int | None,
        typer.Option(
            help="Answer probes over HTTP on this port of the inference address's host, at "
            "/v2/health/ready and /v2/health/live."
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that SIGTERM leaves to what is in flight; 0 cuts it off."
        ),
    ] = 30,
    notice: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds before those, in which a proxy may still send requests while it learns "
            "that this server is not ready any more.",
        ),
    ] = 0,
) -> None:
    """Run TorchServe in the foreground until Ctrl-C, or SIGTERM and all answers in flight."""
    from ft_handler.servers.torchserve.properties import ServeOptions, default_config, sequence

    options = ServeOptions(
        config=config or default_config(),
        model_store=model_store,
        models=sequence(models or []),
        token_auth=token_auth,
        model_api=enable_model_api,
        port=port,
        grpc_port=grpc_port,
    )
    raise typer.Exit(run(options, timeout, End(notice, drain), health_port, exporter_port))


@dataclass(frozen=True)
class End:
    """How a server ends on SIGTERM: seconds of notice, and seconds for what is in flight then."""

    notice: float
    drain: float


def run(
    options: ServeOptions,
    timeout: float,
    end: End,
    health_port: int | None,
    exporter_port: int | None,
) -> int:
    """Serve until Ctrl-C, or until SIGTERM and `end`; the process's exit code."""
    from rich.console import Console

    from ft_handler.servers.torchserve.exporter import Exporter
    from ft_handler.servers.torchserve.health import Health
    from ft_handler.servers.torchserve.process import Server
    from ft_handler.servers.torchserve.properties import shown as address_of
    from ft_handler.servers.torchserve.readiness import Readiness

    # highlight=False: addresses must survive copy and paste from a narrow terminal.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    server = Server(options)
    asked: list[int] = []
    heeded = threading.Event()
    heeded.set()

    def on_signal(number: int, _frame: object) -> None:
        if heeded.is_set():
            heeded.clear()  # once it stops, it stops
            asked.append(number)
            raise KeyboardInterrupt

    exporter = None if exporter_port is None else Exporter.of(server, exporter_port)
    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    health: Health | None = None
    serving = False
    try:
        if health_port is not None:
            readiness = Readiness(server)
            health = Health(
                server.host_of("inference_address"), health_port, readiness.obstacle, server.answers
            )
            health.start()
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
        if health_port is not None:
            console.print(
                f"  ready       http://{server.host_of('inference_address')}:{health_port}"
                "/v2/health/ready"
            )
        console.print("Ctrl-C stops the server")
        serving = True
        code = server.wait()
        console.print(f"TorchServe ended by itself with code {code}", style="red")
        return code or 1
    except KeyboardInterrupt:
        if serving and asked == [signal.SIGTERM]:
            _drain(server, health, end, console, heeded)
        console.print("stopping")
        return 0
    finally:
        heeded.clear()
        server.stop()
        for endpoint in (exporter, health):
            if endpoint is not None:
                endpoint.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _drain(
    server: Server, health: Health | None, end: End, console: Console, heeded: threading.Event
) -> None:
    """Let the server finish what is in flight; another signal ends the wait."""
    if health is not None:
        health.draining = True
    try:
        heeded.set()
        console.print("draining: not ready any more; another signal stops at once")
        idle = server.drain(end.notice, end.drain)
        heeded.clear()
        if not idle and server.alive:
            console.print(
                f"requests are still in flight {end.notice + end.drain:g} s after SIGTERM: cut off",
                style="red",
            )
    except KeyboardInterrupt:
        pass
