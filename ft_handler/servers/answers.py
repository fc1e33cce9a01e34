"""One batch of requests of both kinds answered: predictions, and explanations of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ft_handler.errors import RequestError
from ft_handler.request.pipeline import Pipeline
from ft_handler.stats import BatchStats
from ft_handler.types import Incoming, Reply, Trace


def answers(
    pipeline: Pipeline[Any, Any, Any],
    explainer: Pipeline[Any, Any, Any] | None,
    predicted: Sequence[Incoming | RequestError],
    explained: Sequence[Incoming | RequestError],
    predicted_traces: Sequence[Trace | None] | None = None,
    explained_traces: Sequence[Trace | None] | None = None,
) -> tuple[list[Reply], list[Reply], BatchStats]:
    """Replies to both kinds, each in order, and the figures of all.

    Predictions are computed first, and explanations, which are long, get what is left of the
    batch's bounds. Where there is no explainer nothing may be asked of it. Traces are as in
    `Pipeline.run`. Raises EngineLost.
    """
    replies, stats = pipeline.run(predicted, traces=predicted_traces)
    explanations: list[Reply] = []
    if explainer is not None and explained:
        explanations, more = explainer.run(explained, stats, explained_traces)
        stats.add(more)
    return replies, explanations, stats
