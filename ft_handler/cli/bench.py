"""`ft-handler bench`: the repository's benchmark scripts by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from ft_handler.errors import EnvironmentProblem

#: Benchmark -> its script in the repository, and its help line.
BENCHMARKS = {
    "encoder": ("encoder.py", "The encoder beside other engines, on ragged batches."),
    "serving": ("serving.py", "Requests a second and latencies through TorchServe."),
}


def benchmark_script(name: str) -> Path:
    """The script in the clone one stands in, or in the clone this package runs from."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        script = root / "benchmarks" / name
        if script.is_file():
            return script
    raise EnvironmentProblem(
        f"benchmarks/{name} is not here: benchmarks are part of the repository, run this in a clone"
    )


def _runs(script: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        command = [sys.executable, str(benchmark_script(script)), *context.args]
        raise typer.Exit(subprocess.run(command).returncode)

    return run


def bench_commands() -> typer.Typer:
    """The group of benchmarks."""
    group = typer.Typer(no_args_is_help=True)
    for name, (script, help_line) in BENCHMARKS.items():
        # Everything after the name, --help included, is the script's.
        group.command(
            name,
            help=help_line,
            context_settings={
                "allow_extra_args": True,
                "ignore_unknown_options": True,
                "help_option_names": [],
            },
        )(_runs(script))
    return group
