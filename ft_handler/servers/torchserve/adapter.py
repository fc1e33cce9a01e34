"""What TorchServe hands over, as requests: one dict each, holding a body or the fields of a form.

`{"data": ...}` is also a body of gRPC, and the query of `/invocations` comes as fields. HTTP
requests have headers, gRPC requests none. What a request is for stands there too: explanations and
descriptions reach the same handler.
"""

from __future__ import annotations

from collections.abc import Mapping

from ft_handler.errors import RequestError
from ft_handler.servers import inputs
from ft_handler.types import Incoming

_NO_HEADERS: Mapping[str, str] = {}
#: Headers by which TorchServe marks what is no prediction.
EXPLAIN, DESCRIBE = "explain", "describe"


def purpose(headers: Mapping[str, str]) -> str | None:
    """What a request is for: EXPLAIN, DESCRIBE, or None for a prediction."""
    for header in (EXPLAIN, DESCRIBE):
        if headers.get(header) == "True":
            return header
    return None


def over_grpc(headers: Mapping[str, object]) -> bool:
    """Whether a request's headers, as TorchServe keeps them, are those of a gRPC call: none.

    A header is a text. Beside them TorchServe keeps a dict for every input, under the input's name.
    """
    return str not in map(type, headers.values())


def incoming(
    item: Mapping[str, object], headers: Mapping[str, str] = _NO_HEADERS, why: str | None = None
) -> Incoming | RequestError:
    """One element of TorchServe's `data` as a request, or why it is none.

    why  what the request is for, as `purpose` says, unless that is offered
    """
    return inputs.not_explained() if why is EXPLAIN else inputs.incoming(item, headers)
