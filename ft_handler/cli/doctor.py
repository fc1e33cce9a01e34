"""`ft-handler doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor_command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a line a probe.")
    ] = False,
) -> None:
    """Print what a bug report needs, and check that this installation can answer requests.

    The exit status is 1 when `packages`, `torch` or `library` failed, else 0.
    The other probes inform: without GPU or nvcc the CPU computes,
    and only `ft-handler serve` needs Java and TorchServe.
    """
    from ft_handler.doctor import print_report

    raise typer.Exit(print_report(as_json=as_json))
