"""Serves in the foreground until Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import ServeOptions

# -- the command ---------------------------------------------------------------------------------


def serve_command(options: ServeOptions, *, timeout: float = 300, cwd: Path | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; the process's exit code."""
    from rich.console import Console

    # highlight=False: addresses must survive copy and paste from a narrow terminal.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    server = Server(options, cwd=cwd)
    asked = threading.Event()

    def on_signal(number: int, _frame: object) -> None:
        if asked.is_set():
            return  # already stopping
        asked.set()
        raise KeyboardInterrupt

    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        console.print(f"Java {server.java.version} from {server.java.origin} ({server.java.path})")
        server.start()
        with console.status("starting TorchServe") as status:

            def show(done: Sequence[str], waiting: Sequence[str]) -> None:
                status.update(f"{len(done)} of {len(done) + len(waiting)} models ready")

            seconds = server.wait_ready(timeout, show)
        names = server.registered()
        console.print(f"ready after {seconds:.1f} s: {', '.join(names) or 'no model registered'}")
        for name in names:
            console.print(f"  predict     {server.inference}/predictions/{name}")
        console.print(f"  management  {server.management}/models")
        console.print(f"  metrics     {server.metrics}/metrics")
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
        for number, handler in previous.items():
            signal.signal(number, handler)
