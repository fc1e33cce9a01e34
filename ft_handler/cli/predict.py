"""`ft-handler predict`: answers on this machine, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ft_handler.cli.choices import choice
from ft_handler.config import DEVICES
from ft_handler.errors import RequestError


def predict_command(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What `ft-handler trace` wrote: its folder or file."),
    ],
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT",
            help="Plain text, or a JSON object or list as in an HTTP body; - reads standard input, "
            "one of them a line.",
        ),
    ],
    device: Annotated[
        str, choice("--device", names=DEVICES, help="auto takes a GPU where there is one.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's choice.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say what each word does for the answer, instead of it."),
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUE",
            help="A request parameter, such as top_k=3; the value is JSON, else a string. May be "
            "repeated.",
        ),
    ] = None,
) -> None:
    """Answer on this machine, without a server: one line of JSON a TEXT, as over HTTP.

    A refused TEXT gets the error's body instead, and the exit status is then 1.
    """
    # Before the imports, so that a mistyped option is told at once.
    parameters = dict(_parameter(given) for given in param or [])

    import orjson

    from ft_handler.predictor import Predictor

    predictor = Predictor.load(directory, device=device, num_threads=threads)
    answers = predictor.explain if explain else predictor.predict
    refused = False
    for body in _bodies(texts):
        answer: object
        try:
            answer = answers(_inputs(body), **parameters)
        except RequestError as error:
            refused = True
            answer = {"code": error.status, "type": error.type, "message": str(error)}
        # Bytes, as over HTTP: UTF-8 whatever the terminal speaks, and written at once, since
        # whoever writes to our standard input may wait for them.
        typer.echo(orjson.dumps(answer))
    raise typer.Exit(1 if refused else 0)


def _bodies(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if text == "-":
            # Of a line that is not UTF-8 surrogates are left, as of such an argument; the predictor
            # refuses it, and the other lines are answered.
            for line in sys.stdin.buffer:
                yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        else:
            yield text


def _inputs(body: str) -> object:
    """The JSON object or list that `body` is, else `body` itself."""
    try:
        document: object = json.loads(body)
    except ValueError:
        return body
    return document if isinstance(document, (dict, list)) else body


def _parameter(given: str) -> tuple[str, object]:
    name, equals, value = given.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{given!r} is not NAME=VALUE.", param_hint="'--param'")
    if name in ("self", "inputs"):
        raise typer.BadParameter(f"{name!r} is no parameter.", param_hint="'--param'")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
