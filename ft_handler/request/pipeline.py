"""The request path, stage by stage; runs without any server.

Incoming -decode-> Item -tokenize-> Encoding -bucket, pack-> PackedBatch -engine-> Outputs
 -postprocess-> Prediction -assemble-> Reply

Items go through in whatever parts suit the engine. A stage answers or refuses an item by setting
its result, and skips those that have one; what fails on the way fails its own items alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import orjson

from ft_handler.config import CoreSettings
from ft_handler.engine.base import Engine
from ft_handler.errors import InternalError, RequestError
from ft_handler.request.batching import (
    default_buckets,
    finite,
    flatten,
    outputs_of,
    plan_buckets,
    restore,
)
from ft_handler.request.documents import Decoder, Limits
from ft_handler.request.failures import log_failure
from ft_handler.request.flight import Flight
from ft_handler.request.forms import TRUNCATED
from ft_handler.request.overlap import LEAST_PART_BYTES, overlapped, parts_of
from ft_handler.request.replies import assemble, encoded, outcome
from ft_handler.request.spans import Spans
from ft_handler.request.tracing import Journal
from ft_handler.request.work import NO_BOUNDS, Bounds, Work
from ft_handler.stats import BatchStats, Stopwatch
from ft_handler.tasks.base import EncodingT, ParamsT, Runner, Task
from ft_handler.types import Floats, Form, Incoming, InputT, Item, Outputs, Reply, Trace

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Part(Generic[EncodingT]):
    """Encodings that are under way together."""

    encodings: list[EncodingT]
    flight: Flight

    def abandon(self) -> None:
        self.flight.abandon()


class Pipeline(Generic[InputT, ParamsT, EncodingT]):
    """Chains the stages for one model; safe from several threads.

    task, runner  what the model is for, and that over the loaded model
    engine        encoder and head
    max_positions positions of the model
    model         its name and version, for Open Inference answers
    bounds        how much a request, and what comes together, may ask for
    least_part    bytes of text that a part of a batch has at least, on a device that overlaps
    most_bytes    of one reply's body; None is no bound
    spans         where requests' spans are written, if anywhere
    clock         seconds, for the figures and the bounds
    """

    def __init__(
        self,
        task: Task[InputT, ParamsT, EncodingT, Any],
        runner: Runner[InputT, ParamsT, EncodingT],
        engine: Engine,
        settings: CoreSettings,
        *,
        max_positions: int,
        model: Mapping[str, str],
        bounds: Bounds = NO_BOUNDS,
        least_part: int = LEAST_PART_BYTES,
        most_bytes: int | None = None,
        spans: Spans | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        runner.bound(bounds.input)
        self._runner = runner
        self._engine = engine
        self._per_token = task.per_token
        self._clock, self._bounds, self._most_bytes = clock, bounds, most_bytes
        self._least_part = least_part
        self._spans, self._timing = spans, settings.server_timing
        self._max_batch_tokens = settings.max_batch_tokens
        edges = settings.length_buckets
        self._edges = default_buckets(max_positions) if edges is None else edges
        limits = Limits(settings.max_inputs_per_request, settings.max_text_chars, runner.most_texts)
        self._decoder = Decoder(task, runner.defaults, limits, model)

    def run(
        self,
        incoming: Sequence[Incoming | RequestError],
        done: BatchStats | None = None,
        traces: Sequence[Trace | None] | None = None,
    ) -> tuple[list[Reply], BatchStats]:
        """One reply a request, in order, and their figures.

        incoming  requests, or why a server front refuses one already
        done      what another pipeline did of the same batch before
        traces    what each request's headers tie it to, as `tracing.trace_of` reads them; None is
                  for batches that come from no server, whose replies have no headers

        Raises EngineLost when the process has to be started again.
        """
        stats = BatchStats(requests=len(incoming))
        journal = Journal(traces, self._clock, timing=self._timing, spans=self._spans)
        watch = Stopwatch(self._clock, stats.seconds, journal.laps)
        requests, items = self._decode(incoming)
        watch.lap("decode")
        bounds = self._bounds if done is None else self._bounds.after(done)
        self._answer(requests, items, stats, watch, bounds, journal)
        replies = assemble(requests, items, journal.headers, self._most_bytes)
        for reply in replies:
            if reply.error:
                stats.errors[reply.error] += 1
                stats.failed += reply.status >= 500
                stats.refused += reply.status < 500
        watch.lap("encode")
        journal.close(replies, stats)
        return replies, stats

    def predict(self, incoming: Incoming) -> object:
        """The answer to one request, as JSON would have it; raises RequestError and EngineLost."""
        stats = BatchStats(requests=1)
        requests, items = self._decode([incoming])
        journal = Journal(None, self._clock, timing=False, spans=None)
        watch = Stopwatch(self._clock, stats.seconds)
        self._answer(requests, items, stats, watch, self._bounds, journal)
        (form,) = requests
        if isinstance(form, RequestError):
            raise form
        predictions = outcome(form, items)
        if isinstance(predictions, RequestError):
            raise predictions
        return orjson.loads(encoded(form.document(predictions)))

    # -- stages --

    def _decode(
        self, incoming: Sequence[Incoming | RequestError]
    ) -> tuple[list[Form | RequestError], list[Item[InputT]]]:
        """Each request's form, or the error that refuses it, and the items of all of them."""
        requests: list[Form | RequestError] = []
        items: list[Item[InputT]] = []
        for index, one in enumerate(incoming):
            try:
                if isinstance(one, RequestError):
                    raise one
                request = self._decoder.decode(one)
                requests.append(request.form)
                for position, value in enumerate(request.inputs):
                    items.append(Item(index, position, value))
            except RequestError as error:
                requests.append(error)
            except Exception as error:
                log_failure("decode", error)
                requests.append(InternalError())
        return requests, items

    def _answer(
        self,
        requests: list[Form | RequestError],
        items: Sequence[Item[InputT]],
        stats: BatchStats,
        watch: Stopwatch,
        bounds: Bounds,
        journal: Journal,
    ) -> None:
        """Give every item its result, or its request the error that refuses it as a whole."""
        overlaps = self._engine.overlaps
        parts = parts_of(items, self._least_part) if overlaps else [list(items)]
        work: Work[EncodingT] = Work(bounds, self._clock)
        lengths: list[int] = []

        def start(part: list[Item[InputT]]) -> _Part[EncodingT]:
            begun = self._start(part, work, watch)
            lengths.extend(begun.flight.sequences.lengths.tolist())
            journal.count(begun.encodings)
            return begun

        def finish(part: _Part[EncodingT]) -> None:
            stats.buckets += self._finish(part, watch)

        overlapped(parts, start, finish)
        for request, error in work.refused.items():
            requests[request] = error
        stats.sequences = len(lengths)
        stats.tokens = sum(lengths)
        stats.padded = stats.sequences * max(lengths, default=0) - stats.tokens
        # A request may ask for longer sequences than the default.
        stats.padded_fixed = max(0, stats.sequences * self._runner.longest - stats.tokens)

    def _start(
        self, items: list[Item[InputT]], work: Work[EncodingT], watch: Stopwatch
    ) -> _Part[EncodingT]:
        """Tokenize, pack and launch."""
        for part in work.slices(items):
            work.admit(self._tokenize(part))
        encodings = _wanted(work.start(), items)
        watch.lap("tokenize")
        try:
            sequences = flatten(encodings)
            plan = plan_buckets(sequences.lengths, self._edges, self._max_batch_tokens)
        except Exception as error:
            self._refuse(encodings, "pack", error)
            sequences, plan = flatten([]), []
        watch.lap("pack")
        flight = Flight(self._engine, encodings, sequences)
        flight.launch(plan)
        watch.lap("compute")
        return _Part(encodings, flight)

    def _tokenize(self, items: list[Item[InputT]]) -> list[EncodingT]:
        """Encodings of the items that have one."""
        encodings: list[EncodingT] = []
        try:
            encodings = self._runner.encode(items)
        except Exception as error:
            log_failure("tokenize", error)
            # One at a time, so that only the culprit suffers.
            for item in items:
                try:
                    item.result = None
                    encodings += self._runner.encode([item])
                except Exception:
                    item.result = InternalError()
        return _wanted(encodings, items)

    def _finish(self, part: _Part[EncodingT], watch: Stopwatch) -> int:
        """Wait for a part and answer its items; how many buckets it had."""
        done = part.flight.collect()
        watch.lap("compute")
        if done:
            try:
                values = restore(done, part.flight.sequences, self._per_token)
                self._predict(part, values)
            except Exception as error:
                self._refuse(part.encodings, "postprocess", error)
        watch.lap("postprocess")
        return len(done)

    def _predict(self, part: _Part[EncodingT], values: Floats) -> None:
        sequences = part.flight.sequences
        good = finite(values, sequences, self._per_token)
        if not good.all():
            logger.error("the model gave no finite logits for %d sequences", int((~good).sum()))
            for owner in np.unique(sequences.owners[~good]).tolist():
                part.flight.refuse(owner, InternalError())
        encodings = [e for e in part.encodings if e.item.result is None]
        if not encodings:
            return
        outputs = Outputs(values, sequences.lengths)
        if len(encodings) != len(part.encodings):
            unanswered = np.array([e.item.result is None for e in part.encodings])
            chosen = unanswered[sequences.owners]
            outputs = outputs_of(values, sequences, chosen, self._per_token)
        predictions = self._runner.predict(encodings, outputs)
        for encoding, prediction in zip(encodings, predictions, strict=True):
            if encoding.truncated:
                for answer in prediction if isinstance(prediction, list) else [prediction]:
                    answer[TRUNCATED] = True
            encoding.item.result = prediction

    def _refuse(self, encodings: Sequence[EncodingT], stage: str, error: Exception) -> None:
        """Our failure between two stages: it takes out the items it concerns."""
        log_failure(stage, error)
        for encoding in encodings:
            if encoding.item.result is None:
                encoding.item.result = InternalError()


def _wanted(encodings: list[EncodingT], items: Sequence[Item[InputT]]) -> list[EncodingT]:
    """Where one input refuses its request, nobody will see the others' answers."""
    refused = {item.request for item in items if item.result is not None}
    if not refused:
        return encodings
    return [e for e in encodings if e.item.request not in refused]
