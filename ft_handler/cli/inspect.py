"""`ft-handler inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ft_handler.servers.torchserve.inspection import Inspection


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A traced file, the folder `ft-handler trace` wrote, or a .mar."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; sizes are in bytes.")
    ] = False,
    digest: Annotated[
        str | None,
        typer.Option(
            metavar="sha256:HEX", help="Fail unless the file has this digest; nothing else is read."
        ),
    ] = None,
) -> None:
    """Say what a traced file, a traced folder or a .mar is, and what a server would run of it.

    Nothing of it is loaded or run.
    """
    from ft_handler.servers.torchserve.inspection import inspect

    found = inspect(path, digest)
    if as_json:
        # YAML knows types that JSON does not, such as dates.
        typer.echo(json.dumps(found.document(), indent=1, default=str))
    else:
        _show(found)


def _show(found: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        # Names in a file are anybody's: no markup, nothing a terminal would obey.
        printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
        table.add_row(Text(name), Text(printable))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1 << 16)  # a program reads it: lines stay whole
    console.print(table)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield found.kind, str(found.path)
    yield "size", _size(found.size)
    if found.digest is not None:
        yield "digest", found.digest
    traced = found.traced
    if found.kind != "traced file":
        yield "model", f"{traced.name} ({_size(traced.size)})"
    for name, value in asdict(traced.info).items():
        yield name, _flat(value)
    yield "tokenizer", "inside" if traced.has_tokenizer else "not inside the traced file"
    if found.manifest is not None:
        yield from _section("manifest", found.manifest)
    if found.settings is not None:
        yield from _section("settings", found.settings)
    for name, size in found.files.items():
        yield "file", f"{name} ({_size(size)})"
    if found.handler is not None:
        yield "runs", f"{found.handler}: the handler"
    for one in found.code:
        yield "runs", f"{one.name}: {one.runs}"
        yield "", one.digest


def _section(title: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One row a value; what nests gets a dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _section(f"{title}.{name}", value)
        else:
            yield f"{title}.{name}", _flat(value)


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items()) or "none"
    return "none" if value is None else str(value)


def _size(size: int) -> str:
    """Bytes, exact and for people."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size:,} bytes, {size / 2**power:.1f} {unit}"
    return f"{size:,} bytes"
