"""One request of a batch, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ft_handler.types import Incoming, Trace


class Asked(NamedTuple):
    """A request; its cost is its share of a batch, counted in requests."""

    incoming: Incoming
    explain: bool
    cost: float
    trace: Trace | None = None


def cost_of(asked: Sequence[Asked]) -> int:
    """What a batch costs, in requests of the usual size."""
    return math.ceil(sum(one.cost for one in asked))
