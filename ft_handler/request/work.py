"""How much one batch of requests may ask for, so that its answers come in time.

A worker that answers too late is killed with every request it holds, so what cannot be done in time
is refused: a request that is too much by itself with 413, and of several that are too much together
the largest with 503. Work is counted in tokens, windows included, as texts are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic

from ft_handler.config import CoreSettings
from ft_handler.engine.base import Engine, synthetic_batch
from ft_handler.errors import Overloaded, RequestError, RequestTooLarge
from ft_handler.stats import BatchStats
from ft_handler.tasks.base import EncodingT
from ft_handler.types import InputT, Item

#: Texts are read in slices of so many characters, and what they ask for is counted after each.
SLICE_CHARS = 1 << 16
#: Of the time that answers may take, what computing and reading may take at most. The rest is for
#: what is not counted, and for a machine that has become slower.
COMPUTE_SHARE, READ_SHARE = 0.5, 0.25
#: Sequences are timed so often, and the best time counts.
_RUNS = 2


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is too much; None is no bound.

    request  tokens of one request
    batch    tokens of all requests that are handed over together
    seconds  of reading the texts of a batch
    """

    request: int | None = None
    batch: int | None = None
    seconds: float | None = None

    @property
    def input(self) -> int | None:
        """Tokens that one input can never have more than."""
        return min((b for b in (self.request, self.batch) if b is not None), default=None)

    def after(self, done: BatchStats) -> Bounds:
        """What is left where a part of the batch is done."""
        batch = None if self.batch is None else max(0, self.batch - done.tokens)
        seconds = None if self.seconds is None else self.seconds - done.seconds["tokenize"]
        return Bounds(self.request, batch, seconds)


NO_BOUNDS = Bounds()


def tokens_in(
    seconds: float,
    engine: Engine,
    longest: int,
    vocab_size: int,
    clock: Callable[[], float],
    sequences: int = 1,
) -> int:
    """Tokens that an engine computes in so many seconds, as it is timed now.

    longest    tokens of the sequences that are timed: the longest are the slowest, token by token
    sequences  how many are timed at once
    """
    batch = synthetic_batch([longest] * sequences, vocab_size)
    best = inf
    for _ in range(_RUNS):
        start = clock()
        engine.launch(batch).result()
        best = min(best, clock() - start)
    return max(longest, int(batch.total * seconds / max(best, 1e-6)))


def bounds_of(
    settings: CoreSettings, answer_within: float | None, measure: Callable[[float], int]
) -> Bounds:
    """The settings' bounds, and where they have none what can be done in `answer_within` seconds.

    answer_within  how long whoever asks waits for a batch; None is for ever
    measure        tokens that are computed in so many seconds; not asked without warm-up
    """
    request, batch = settings.max_request_tokens, settings.max_work_tokens
    if answer_within is None:
        return Bounds(request, batch)
    if batch is None and settings.warmup:
        batch = max(request or 0, measure(COMPUTE_SHARE * answer_within))
    if batch is not None:
        request = min(request or batch, batch)
    return Bounds(request, batch, READ_SHARE * answer_within)


class Work(Generic[EncodingT]):
    """What one batch asks for as its texts are read, and the requests that are refused for it."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self.refused: dict[int, RequestError] = {}
        self._bounds, self._clock = bounds, clock
        #: Up to so many tokens nobody can be refused.
        self._safe = min(b for b in (bounds.request, bounds.batch, inf) if b is not None)
        self._until = inf if bounds.seconds is None else clock() + bounds.seconds
        self._total = 0
        self._admitted: list[EncodingT] = []
        self._started = 0  # how many of them are under way

    def slices(self, items: list[Item[InputT]]) -> Iterator[list[Item[InputT]]]:
        """The items in slices to read one after the other, without those of refused requests."""
        unusable: set[int] = set()  # one input of them is, and nobody will see the others' answers
        for number, part in enumerate(_sliced(items)):
            if number and self._clock() > self._until:
                for item in part:
                    self.refused.setdefault(item.request, Overloaded())
            if self.refused or unusable:
                left = self.refused.keys() | unusable
                part = [item for item in part if item.request not in left]
            if part:
                yield part
                unusable |= {i.request for i in part if isinstance(i.result, RequestError)}

    def admit(self, encodings: Sequence[EncodingT]) -> None:
        """Count what a slice asks for, and refuse what is too much."""
        self._admitted += encodings
        self._total += sum([len(ids) for e in encodings for ids in e.sequences])
        if self._total > self._safe:
            self._refuse()

    def start(self) -> list[EncodingT]:
        """What was admitted since the last start, to be computed now."""
        started = self._admitted[self._started :]
        self._started = len(self._admitted)
        return started

    def _refuse(self) -> None:
        asked: Counter[int] = Counter()
        waiting: Counter[int] = Counter()  # of these, what is not under way
        for number, encoding in enumerate(self._admitted):
            request, tokens = encoding.item.request, sum(map(len, encoding.sequences))
            asked[request] += tokens
            if number >= self._started:
                waiting[request] += tokens
        most = self._bounds.request
        for request in [*waiting]:
            if most is not None and asked[request] > most:
                self.refused[request] = RequestTooLarge(
                    f"the request has over {most} tokens, which is all that is computed for one: "
                    "send fewer or shorter texts"
                )
                self._total -= waiting.pop(request)
        while waiting and self._bounds.batch is not None and self._total > self._bounds.batch:
            largest = max(reversed(waiting), key=waiting.__getitem__)  # of equals the last
            self.refused[largest] = Overloaded()
            self._total -= waiting.pop(largest)
        self._admitted[self._started :] = [
            e for e in self._admitted[self._started :] if e.item.request in waiting
        ]


def _sliced(items: list[Item[InputT]]) -> Iterator[list[Item[InputT]]]:
    """Neighbouring items with texts of about `SLICE_CHARS` together, or one alone."""
    sizes = [sum(map(len, item.input.texts)) for item in items]
    if sum(sizes) <= SLICE_CHARS:
        yield items
        return
    begin = chars = 0
    for at, size in enumerate(sizes):
        if chars and chars + size > SLICE_CHARS:
            yield items[begin:at]
            begin, chars = at, 0
        chars += size
    yield items[begin:]
