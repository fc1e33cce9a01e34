"""One request of a batch, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ft_handler.types import Incoming


class Asked(NamedTuple):
    """A request; its cost is its share of a batch, counted in requests."""

    incoming: Incoming
    explain: bool
    cost: float


def cost_of(asked: Sequence[Asked]) -> int:
    """What a batch costs, in requests of the usual size."""
    return math.ceil(sum(one.cost for one in asked))


def size_of(incoming: Incoming) -> int:
    """Bytes that a request brought: nearly in proportion to its tokens, and known without reading.

    What a parser has made something of already counts nothing.
    """
    values = (incoming.body, *incoming.fields.values())
    return sum(len(value) for value in values if isinstance(value, (bytes, bytearray, str)))
