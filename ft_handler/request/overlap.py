"""Large batches in parts, so that a device and the host work at once.

While the device computes one part, the next is tokenized and launched, and then the answers of
those that are done are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from ft_handler.types import InputT, Item

#: A batch goes in at most so many parts.
MOST_PARTS = 3
#: What the host does once a part, 0.6 ms with its launch, is lost where the device is done too
#: soon: a part is to take so long, launched and waited for. It lies between what was best in two
#: parts (FP8) and what was best in three (fp16), benchmarks/NOTES.md.
PART_SECONDS = 1.4e-3
#: And a part has at least so many bytes of text, some 2,500 tokens in most languages: smaller
#: launches would use a GPU badly.
LEAST_PART_BYTES = 12_000
_BYTES_A_TOKEN = 4.8


def least_part(tokens: int) -> int:
    """Bytes of text that a part has at least where the device needs `tokens` for PART_SECONDS."""
    return max(LEAST_PART_BYTES, int(_BYTES_A_TOKEN * tokens))


def text_bytes(item: Item[Any]) -> int:
    """How many bytes of UTF-8 an item's texts have: what a part's work is measured by."""
    return sum([len(t) if t.isascii() else len(t.encode()) for t in item.input.texts])


def parts_of(
    items: Sequence[Item[InputT]], least_bytes: int = LEAST_PART_BYTES
) -> list[list[Item[InputT]]]:
    """Neighbouring items in parts of similar size, of `least_bytes` of text and more."""
    sizes = [text_bytes(item) for item in items]
    total = sum(sizes)
    count = min(MOST_PARTS, total // least_bytes)
    if count < 2:
        return [list(items)]
    parts: list[list[Item[InputT]]] = [[] for _ in range(count)]
    before = 0
    for item, size in zip(items, sizes, strict=True):
        at = before * count // total
        # What has no text and comes last begins where everything has ended.
        parts[at if at < count else count - 1].append(item)
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
