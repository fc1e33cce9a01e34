"""What ties a request to others' records of it: read from its headers, returned in its reply's.

A server front makes a `Trace` of each request's headers and hands the traces to the pipeline beside
the requests; everything else is done here. Nothing that a client wrote is returned, or handed on to
a tracing system, unless it has the form of an id.
"""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ft_handler.request.failures import log_failure
from ft_handler.request.spans import Spans, Told
from ft_handler.stats import BatchStats, Lap
from ft_handler.types import Encoding, Reply, Trace

REQUEST_ID = "X-Request-Id"
TRACEPARENT = "traceparent"
SERVER_TIMING = "Server-Timing"

_NAMES = {
    "traceparent": "traceparent",
    "tracestate": "tracestate",
    "x-request-id": "request_id",
    "x-request-start": "arrived",
}
_REQUEST_ID = re.compile(r"[\w.:+/=@-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_START = re.compile(r"(?:t=)?([0-9]{10,17}(?:\.[0-9]{1,9})?)")
#: Seconds; whoever says to have waited longer has another clock.
_LONGEST_WAIT = 3600.0


def trace_of(
    headers: Mapping[str, object], arrived: float | None = None, request_id: str | None = None
) -> Trace | None:
    """What a request's headers tie it to; None when that is nothing. Names of headers have no case.

    arrived     when the server took the request in, by time.time(); a proxy's X-Request-Start is
                earlier and wins
    request_id  what the server calls the request, when the client gave no usable id
    """
    known = _known(tuple(headers))
    if not known and arrived is None and request_id is None:
        return None
    # TorchServe keeps other things among the headers.
    found = {own: value for name, own in known if isinstance(value := headers[name], str)}
    return Trace(
        _request_id(found.get("request_id")) or request_id,
        _traceparent(found.get("traceparent")),
        found.get("tracestate"),
        _start(found.get("arrived")) or arrived,
    )


@lru_cache(256)
def _known(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Which of a request's headers count, with the name of ours; a client's are always the same."""
    return tuple((name, _NAMES[name.lower()]) for name in names if name.lower() in _NAMES)


def new_request_id() -> str:
    """An id for a request, for servers that give none of their own."""
    return str(uuid.uuid4())


def _request_id(value: str | None) -> str | None:
    return value if value and _REQUEST_ID.fullmatch(value) else None


def _traceparent(value: str | None) -> str | None:
    """The part that every version of the header has, if it is valid."""
    match = _TRACEPARENT.match(value or "")
    if not match or not value:
        return None
    more = value[match.end() :]
    return match[0] if not more or (more[0] == "-" and value[:2] != "00") else None


def _start(value: str | None) -> float | None:
    """When a proxy took the request in: seconds, milliseconds or microseconds of Unix time."""
    match = _START.fullmatch((value or "").strip())
    if not match:
        return None
    seconds = float(match[1])
    while seconds > 1e11:
        seconds /= 1000
    return seconds


class Journal:
    """What is written down while one batch is answered, and what its replies say of it.

    headers  of every reply, filled in at the end
    laps     for a stopwatch; None where nobody asks for stages one by one
    """

    def __init__(
        self,
        traces: Sequence[Trace | None] | None,
        clock: Callable[[], float],
        *,
        timing: bool,
        spans: Spans | None,
    ) -> None:
        """traces  one a request; None is a batch of nobody's, whose replies say nothing."""
        self.headers: dict[str, str] = {}
        self._traces = traces
        self._timing = timing
        self._spans = None if traces is None else spans
        self.laps: list[Lap] | None = None if self._spans is None else []
        if traces is not None:
            self._wall = time.time()
            self._clock = clock()
        self._sequences: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()

    def count(self, encodings: Sequence[Encoding[Any]]) -> None:
        """What of each request is computed; only spans ask."""
        if self._spans is not None:
            for encoding in encodings:
                request = encoding.item.request
                self._sequences[request] += len(encoding.sequences)
                self._tokens[request] += sum(map(len, encoding.sequences))

    def close(self, replies: list[Reply], stats: BatchStats) -> None:
        """Give the replies their headers, and write spans."""
        if self._traces is None:
            return
        timing = _timing(stats) if self._timing else ""
        if timing:
            self.headers[SERVER_TIMING] = timing
        for index, trace in enumerate(self._traces):
            if trace is None and self._spans is None:
                continue
            headers = dict(self.headers)
            trace = trace or Trace()
            waited = self._waited(trace)
            if timing and waited is not None:
                headers[SERVER_TIMING] = f"queue;dur={1e3 * waited:.2f}, {timing}"
            if trace.request_id:
                headers[REQUEST_ID] = trace.request_id
            parent = self._span(index, trace, replies[index], waited) or trace.traceparent
            if parent:
                headers[TRACEPARENT] = parent
            replies[index] = replies[index]._replace(headers=headers)

    def _waited(self, trace: Trace) -> float | None:
        """Seconds between a request's arrival and its batch; None when nobody knows."""
        if trace.arrived is None:
            return None
        waited = self._wall - trace.arrived
        # A proxy's clock may be a little ahead, and counts milliseconds.
        return max(0.0, waited) if -1 < waited < _LONGEST_WAIT else None

    def _span(self, index: int, trace: Trace, reply: Reply, waited: float | None) -> str | None:
        """Write a request's span; its traceparent."""
        if self._spans is None or self._traces is None:
            return None
        shift = self._wall - self._clock
        told = Told(
            trace=trace,
            begin=self._wall - (waited or 0.0),
            laps=[Lap(stage, a + shift, b + shift) for stage, a, b in self.laps or ()],
            status=reply.status,
            error=reply.error,
            sequences=self._sequences[index],
            tokens=self._tokens[index],
            together=len(self._traces),
        )
        try:
            return self._spans.write(told)
        except Exception as error:  # a tracing system's failure costs nobody an answer
            log_failure("tracing", error)
            return None


def _timing(stats: BatchStats) -> str:
    """A batch's times as a Server-Timing header, in milliseconds."""
    seconds = stats.seconds
    return (
        f"tokenize;dur={1e3 * seconds['tokenize']:.2f}, "
        f"compute;dur={1e3 * seconds['compute']:.2f}, "
        f"total;dur={1e3 * sum(seconds.values()):.2f}"
    )
