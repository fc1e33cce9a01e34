"""Figures of every batch as TorchServe metrics.

TorchServe prints a line for each and its frontend parses it, so there are few, and they come once
a batch. A name that is not declared in the server's metrics configuration vanishes silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ft_handler.stats import BatchStats


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it has to be declared: dimensions are ModelName and Level.

    kind    "counter" or "histogram"
    always  False: only batches with a value above zero emit it
    """

    name: str
    kind: str
    unit: str
    help: str
    value: Callable[[BatchStats], float]
    always: bool = True


def _host(stats: BatchStats) -> float:
    return sum(s for stage, s in stats.seconds.items() if stage != "compute")


METRICS = (
    Metric(
        "ft_requests_total",
        "counter",
        "count",
        "Requests; divided by the count of ft_host_seconds it is the mean batch size.",
        lambda s: s.requests,
    ),
    Metric(
        "ft_tokens_total",
        "counter",
        "count",
        "Tokens the encoder computed, special tokens included.",
        lambda s: s.tokens,
    ),
    Metric(
        "ft_padding_avoided_total",
        "counter",
        "count",
        "Tokens that padding every sequence to the longest of its batch would have added.",
        lambda s: s.padded,
    ),
    Metric(
        "ft_padding_avoided_fixed_total",
        "counter",
        "count",
        "Tokens that padding every sequence to the longest allowed length would have added.",
        lambda s: s.padded_fixed,
    ),
    Metric(
        "ft_refused_total",
        "counter",
        "count",
        "Requests answered 4xx.",
        lambda s: s.refused,
        always=False,
    ),
    Metric(
        "ft_failed_total",
        "counter",
        "count",
        "Requests answered 5xx.",
        lambda s: s.failed,
        always=False,
    ),
    Metric(
        "ft_undecodable_total",
        "counter",
        "count",
        "Bodies that are not what their Content-Type says: broken JSON, text that is not UTF-8.",
        lambda s: s.undecodable,
        always=False,
    ),
    Metric(
        "ft_host_seconds",
        "histogram",
        "s",
        "Seconds of a batch outside the encoder: decode, tokenize, pack, postprocess, encode; "
        "a GPU may work meanwhile.",
        _host,
    ),
    Metric(
        "ft_compute_seconds",
        "histogram",
        "s",
        "Seconds of a batch in encoder and head: with a GPU, of launching and waiting for it.",
        lambda s: s.seconds["compute"],
    ),
)


def emit(store: Any, stats: BatchStats) -> None:
    """Hand one batch's figures to TorchServe's `ctx.metrics`."""
    from ts.metrics.metric_type_enum import MetricTypes

    kinds = {"counter": MetricTypes.COUNTER, "histogram": MetricTypes.HISTOGRAM}
    for metric in METRICS:
        value = metric.value(stats)
        if value > 0 or metric.always:
            # idx 0: otherwise every line repeats the ids of all requests of the batch. The list
            # is fresh because TorchServe appends to its mutable default.
            store.add_metric(
                metric.name,
                value,
                metric.unit,
                idx=0,
                dimensions=[],
                metric_type=kinds[metric.kind],
            )
