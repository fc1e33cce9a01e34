"""Figures of every batch as TorchServe metrics.

TorchServe prints a line for each and its frontend parses it, so there are few. Times, of which the
frontend makes histograms, come once a batch. Counters are added up here first and come once a
second at most, however many batches there were. A name that is not declared in the server's metrics
configuration vanishes silently.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ft_handler.errors import RequestError
from ft_handler.stats import STAGES, BatchStats

#: Seconds that counters are added up for before they are handed over.
INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it has to be declared: dimensions are its own label, ModelName and Level.

    kind    "counter", "histogram" or "gauge"
    label   the dimension that tells its values apart, if it has several
    labels  what that dimension may be
    """

    name: str
    kind: str
    unit: str
    help: str
    label: str | None = None
    labels: tuple[str, ...] = ()


def _types(error: type[RequestError]) -> Iterator[type[RequestError]]:
    for one in error.__subclasses__():
        yield one
        yield from _types(one)


_ERRORS = {error.__name__: error.status for error in _types(RequestError)}

REQUESTS = Metric(
    "ft_requests_total",
    "counter",
    "count",
    "Requests; divided by the count of ft_host_seconds it is the mean batch.",
)
TOKENS = Metric(
    "ft_tokens_total", "counter", "count", "Tokens the encoder computed, special tokens included."
)
LAUNCHES = Metric(
    "ft_launches_total",
    "counter",
    "count",
    "Packs of sequences handed to the encoder: one a batch, more where one exceeds "
    "max_batch_tokens or work is overlapped.",
)
PADDING = Metric(
    "ft_padding_avoided_total",
    "counter",
    "count",
    "Tokens that padding every sequence to the longest of its batch would have added.",
)
PADDING_FIXED = Metric(
    "ft_padding_avoided_fixed_total",
    "counter",
    "count",
    "Tokens that padding every sequence to the longest allowed length would have added.",
)
STAGE_SECONDS = Metric(
    "ft_stage_seconds_total",
    "counter",
    "s",
    "Seconds that workers spent in each stage; all stages together, by the number of workers, "
    "say how busy they are.",
    "Stage",
    STAGES,
)
REFUSED = Metric(
    "ft_refused_total",
    "counter",
    "count",
    "Requests answered 4xx, by the type of the error.",
    "Reason",
    tuple(name for name, status in _ERRORS.items() if status < 500),
)
FAILED = Metric(
    "ft_failed_total",
    "counter",
    "count",
    "Requests answered 5xx, by the type of the error.",
    "Reason",
    tuple(name for name, status in _ERRORS.items() if status >= 500),
)
UNDECODABLE = Metric(
    "ft_undecodable_total",
    "counter",
    "count",
    "Bodies that are not what their Content-Type says: broken JSON, text that is not UTF-8.",
)
HOST_SECONDS = Metric(
    "ft_host_seconds",
    "histogram",
    "s",
    "Seconds of a batch outside the encoder: decode, tokenize, pack, postprocess, encode; "
    "a GPU may work meanwhile.",
)
COMPUTE_SECONDS = Metric(
    "ft_compute_seconds",
    "histogram",
    "s",
    "Seconds of a batch in encoder and head: with a GPU, of launching and waiting for it.",
)
BATCH_SIZE = Metric("ft_batch_size", "gauge", "count", "Most requests of a batch: batchSize.")
BATCH_TOKENS = Metric(
    "ft_max_batch_tokens",
    "gauge",
    "count",
    "Most tokens that the encoder gets at once, the setting max_batch_tokens.",
)
METRICS = (
    REQUESTS,
    TOKENS,
    LAUNCHES,
    PADDING,
    PADDING_FIXED,
    STAGE_SECONDS,
    REFUSED,
    FAILED,
    UNDECODABLE,
    HOST_SECONDS,
    COMPUTE_SECONDS,
    BATCH_SIZE,
    BATCH_TOKENS,
)


class Startable(Protocol):
    """A timer."""

    def start(self) -> None:
        """Call what it was made for, later."""


def _timer(seconds: float, call: Callable[[], None]) -> Startable:
    timer = threading.Timer(seconds, call)
    timer.daemon = True  # a worker that ends does not wait for figures
    return timer


class Reporter:
    """Hands one worker's figures to TorchServe.

    store   TorchServe's `ctx.metrics`
    model   the model's name
    timer   calls a function so many seconds later
    """

    def __init__(
        self,
        store: Any,
        model: str,
        timer: Callable[[float, Callable[[], None]], Startable] = _timer,
    ) -> None:
        self._store, self._model, self._timer = store, model, timer
        self._lock = threading.Lock()
        self._pending: BatchStats | None = None

    def begin(self, limits: Mapping[Metric, float]) -> None:
        """Hand over the gauges, which never change, and have every counter there from the start.

        A counter that comes into being with its first increment hides it from Prometheus' rate().
        """
        for metric, value in limits.items():
            self._emit(metric, value, batch=False)
        for metric in METRICS:
            if metric.kind == "counter":
                for label in metric.labels or (None,):
                    self._emit(metric, 0, label, batch=False)

    def report(self, stats: BatchStats) -> None:
        """Hand one batch's times over now, and have its counts handed over soon."""
        compute = stats.seconds["compute"]
        self._emit(HOST_SECONDS, sum(stats.seconds.values()) - compute)
        self._emit(COMPUTE_SECONDS, compute)
        with self._lock:
            if self._pending is not None:
                self._pending.add(stats)
                return
            self._pending = stats
        self._timer(INTERVAL, self.flush).start()

    def flush(self) -> None:
        """Hand over what was counted since the last time."""
        with self._lock:
            stats, self._pending = self._pending, None
        if stats is None:
            return
        for metric, value in (
            (REQUESTS, stats.requests),
            (TOKENS, stats.tokens),
            (LAUNCHES, stats.buckets),
            (PADDING, stats.padded),
            (PADDING_FIXED, stats.padded_fixed),
        ):
            self._emit(metric, value)
        for stage, seconds in stats.seconds.items():
            self._emit(STAGE_SECONDS, seconds, stage)
        for error, count in stats.errors.items():
            self._emit(REFUSED if error in REFUSED.labels else FAILED, count, error)
        if stats.undecodable:
            self._emit(UNDECODABLE, stats.undecodable)

    def _emit(
        self, metric: Metric, value: float, label: str | None = None, batch: bool = True
    ) -> None:
        """batch  whether there was one: before the first, TorchServe knows no requests."""
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        own = [] if metric.label is None else [Dimension(metric.label, label)]
        self._store.add_metric(
            metric.name,
            value,
            metric.unit,
            # With 0 a line has the id of one request instead of those of the whole batch.
            idx=0 if batch else None,
            # All of them, in the order of their declaration.
            dimensions=[*own, Dimension("ModelName", self._model), Dimension("Level", "Model")],
            metric_type=MetricTypes(metric.kind),
        )
