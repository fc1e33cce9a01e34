"""Options that take one of several names, shown in the help and completed by the shell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer


def choice(*declarations: str, names: Sequence[str], help: str) -> Any:
    """A typer option that takes one of `names` as a string; anything else is a usage error."""

    def read(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(map(repr, names))}.")
        return value

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return typer.Option(
        *declarations,
        parser=read,
        autocompletion=complete,
        metavar=f"[{'|'.join(names)}]",
        help=help,
    )
