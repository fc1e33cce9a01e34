"""Figures of every batch as Prometheus metrics, beside KServe's own at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from ft_handler.stats import BatchStats

_LABELS = ("model_name",)
_COUNTERS: dict[str, tuple[Counter, Callable[[BatchStats], float]]] = {
    name: (Counter(name, help, _LABELS), value)
    for name, help, value in (
        ("ft_requests", "Requests.", lambda s: s.requests),
        (
            "ft_tokens",
            "Tokens the encoder computed, special tokens included.",
            lambda s: s.tokens,
        ),
        (
            "ft_padding_avoided",
            "Tokens that padding every sequence to the longest of its batch would have added.",
            lambda s: s.padded,
        ),
        ("ft_refused", "Requests answered 4xx.", lambda s: s.refused),
        ("ft_failed", "Requests answered 5xx.", lambda s: s.failed),
    )
}
_BATCH = Histogram(
    "ft_batch_requests", "Requests of a batch.", _LABELS, buckets=[2.0**n for n in range(11)]
)
_SECONDS = [0.001 * 2**n for n in range(14)]
_HOST = Histogram(
    "ft_host_seconds", "Seconds of a batch outside the encoder.", _LABELS, buckets=_SECONDS
)
_COMPUTE = Histogram(
    "ft_compute_seconds", "Seconds of a batch in encoder and head.", _LABELS, buckets=_SECONDS
)
_WAITING = Gauge("ft_queue_requests", "Requests that wait for a batch.", _LABELS)


def record(model: str, stats: BatchStats) -> None:
    """Count one batch."""
    for counter, value in _COUNTERS.values():
        counter.labels(model).inc(value(stats))
    _BATCH.labels(model).observe(stats.requests)
    compute = stats.seconds["compute"]
    _HOST.labels(model).observe(sum(stats.seconds.values()) - compute)
    _COMPUTE.labels(model).observe(compute)


def watch_queue(model: str, waiting: Callable[[], int]) -> None:
    """Have the gauge ask how many requests wait whenever it is read."""
    _WAITING.labels(model).set_function(waiting)
