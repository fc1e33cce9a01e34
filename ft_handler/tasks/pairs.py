"""Which text of a pair is cut when both have no room in a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator

from ft_handler.errors import UnusableRequest
from ft_handler.text.template import longest_first

Strategy: TypeAlias = Literal[True, False, "only_first", "only_second"]
_STRATEGIES: Mapping[str, Strategy] = {
    "longest_first": True,
    "only_first": "only_first",
    "only_second": "only_second",
    "do_not_truncate": False,
}


def _strategy(value: object) -> Strategy:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value not in _STRATEGIES:
        raise ValueError(f"must be true, false or one of {', '.join(_STRATEGIES)}")
    return _STRATEGIES[value]


#: What may be cut: true is whichever is longer, false nothing; transformers' names stand for them.
Truncation = Annotated[Strategy, BeforeValidator(_strategy)]


def kept(first: int, second: int, room: int, limit: int, truncation: Strategy) -> tuple[int, int]:
    """How many tokens of each text stay of a pair that has more than `room`.

    limit  most tokens of the sequence, special ones included

    Raises UnusableRequest where nothing may be cut, or what may be cut is too short for it.
    """
    over = first + second - room
    if not truncation:
        raise UnusableRequest(
            f"the input has {limit + over} tokens, the limit is {limit} and truncation is off"
        )
    if room < 1:
        raise UnusableRequest("'max_length' leaves no room for text")
    if truncation is True:
        return longest_first(first, second, room)
    cut_first = truncation == "only_first"
    if (first if cut_first else second) <= over:
        raise UnusableRequest(
            f"the input has {over} tokens too many, and the text that 'truncation' names "
            "is not that long"
        )
    return (first - over, second) if cut_first else (first, second - over)
