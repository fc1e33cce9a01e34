"""Large batches in parts, so that a device and the host work at once.

While the device computes one part, the next is tokenized and launched, and then the answers of
those that are done are made.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from ft_handler.types import InputT, Item

#: Where the parts of a batch end but the last, by how many there are, as shares of its work. The
#: first is small, since the device waits for it, each that follows takes the host about as long as
#: the device takes for the one before, and the last is smaller, since its answers wait for it.
ENDS = ((), (0.42,), (0.25, 0.65), (0.15, 0.4, 0.78))
#: Of a part, on average: of text some 2,500 tokens in most languages; smaller launches would use a
#: GPU badly.
LEAST_PART_BYTES = 12_000


def text_bytes(item: Item[Any]) -> int:
    """How many bytes of UTF-8 an item's texts have: what a part's work is measured by."""
    return sum([len(t) if t.isascii() else len(t.encode()) for t in item.input.texts])


def parts_of(items: Sequence[Item[InputT]]) -> list[list[Item[InputT]]]:
    """Neighbouring items in parts, each worth a launch of its own."""
    sizes = [text_bytes(item) for item in items]
    total = sum(sizes)
    count = min(len(ENDS), total // LEAST_PART_BYTES)
    if count < 2:
        return [list(items)]
    ends = [total * share for share in ENDS[count - 1]]
    parts: list[list[Item[InputT]]] = [[] for _ in range(count)]
    before = 0
    for item, size in zip(items, sizes, strict=True):
        # By its middle, so that a large item at an end falls to the part that has more of it.
        parts[bisect(ends, before + size / 2)].append(item)
        before += size
    return [part for part in parts if part]


class Abandonable(Protocol):
    """Something under way."""

    def abandon(self) -> None:
        """Wait for it and forget it."""


PartT = TypeVar("PartT")
UnderWay = TypeVar("UnderWay", bound=Abandonable)


def overlapped(
    parts: Sequence[PartT],
    start: Callable[[PartT], UnderWay],
    finish: Callable[[UnderWay], None],
) -> None:
    """Start every part, then finish every part; what an error leaves unfinished is abandoned."""
    flying: list[UnderWay] = []
    try:
        for part in parts:
            flying.append(start(part))
        while flying:
            finish(flying[0])
            flying.pop(0)
    finally:
        for flight in flying:
            flight.abandon()
