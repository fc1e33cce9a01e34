"""Spans of OpenTelemetry: one a request, with a child for each stage it went through.

Whether there are any, where they go and how many of them, the standard OTEL_* variables say.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from ft_handler.config import environment
from ft_handler.stats import Lap
from ft_handler.types import Trace
from ft_handler.version import __version__

logger = logging.getLogger(__name__)

#: Protocol -> the name of its exporter.
_OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


class Told(NamedTuple):
    """What a request's span says. Times are seconds as time.time() counts them.

    laps                 what the whole batch went through
    status, error        the reply's
    sequences, tokens    what was computed for this request
    together             how many requests the batch had
    """

    trace: Trace
    begin: float
    laps: Sequence[Lap]
    status: int
    error: str
    sequences: int
    tokens: int
    together: int


def tracer() -> Any | None:
    """OpenTelemetry's tracer; None where it is not installed or nobody asks for spans.

    What the process has set up already is used. Otherwise OTEL_TRACES_EXPORTER asks for it.
    """
    wanted = (environment("OTEL_TRACES_EXPORTER") or "none").strip().lower() != "none"
    if not wanted and "opentelemetry.trace" not in sys.modules:
        return None  # nobody can have set it up
    try:
        from opentelemetry import trace
    except ImportError:
        if wanted:
            logger.warning(
                "OTEL_TRACES_EXPORTER is set, but OpenTelemetry is not installed: no spans "
                "(pip install 'ft-handler[tracing]')"
            )
        return None
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        provider = _provider() if wanted else None
        if provider is None:
            return None
        trace.set_tracer_provider(provider)
    return trace.get_tracer("ft_handler", __version__)


def _provider() -> Any | None:
    """What sends spans to the exporters that the variables name; None where that is nowhere."""
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning("OpenTelemetry's SDK is not installed: no spans")
        return None
    # The provider itself reads the variables of the sampler, the resource and the limits, and an
    # exporter reads those of its endpoint.
    provider = TracerProvider()
    sends = False
    for name in (environment("OTEL_TRACES_EXPORTER") or "").split(","):
        exporter = _exporter(name.strip())
        if exporter is None:
            logger.warning("no package with OpenTelemetry's exporter '%s' is installed", name)
            continue
        provider.add_span_processor(BatchSpanProcessor(exporter))
        sends = True
    return provider if sends else None


def _exporter(name: str) -> Any | None:
    """An exporter by the name under which its package registers it."""
    names = [name]
    if name == "otlp":
        protocol = environment("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment(
            "OTEL_EXPORTER_OTLP_PROTOCOL"
        )
        names = [_OTLP[protocol]] if protocol in _OTLP else [*_OTLP.values()]
    for one in names:
        for found in entry_points(group="opentelemetry_traces_exporter", name=one):
            return found.load()()
    return None


class Spans:
    """Writes the spans of one model's requests.

    operation  what is done for a request, such as "predict"
    model      its name and version, as `model_name` and `model_version`
    """

    def __init__(self, tracer: Any, operation: str, model: Mapping[str, str]) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer, self._trace = tracer, trace
        self._propagator = TraceContextTextMapPropagator()
        self._name = f"{operation} {model['model_name']}"
        self._model = {f"ft_handler.{key}": value for key, value in model.items()}

    def write(self, told: Told) -> str:
        """Write one request's spans as far as they are sampled; its traceparent."""
        trace = self._trace
        carrier = {"traceparent": told.trace.traceparent, "tracestate": told.trace.tracestate}
        parent = self._propagator.extract({k: v for k, v in carrier.items() if v})
        span = self._tracer.start_span(
            self._name,
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes=self._model,
            start_time=_nanoseconds(told.begin),
        )
        if span.is_recording():
            self._fill(span, told)
        span.end(_nanoseconds(told.laps[-1].end))
        carried: dict[str, str] = {}
        self._propagator.inject(carried, trace.set_span_in_context(span))
        return carried.get("traceparent", "")

    def _fill(self, span: Any, told: Told) -> None:
        trace = self._trace
        span.set_attributes(
            {
                "http.response.status_code": told.status,
                "ft_handler.sequences": told.sequences,
                "ft_handler.tokens": told.tokens,
                "ft_handler.batch_requests": told.together,
            }
        )
        if told.trace.request_id:
            span.set_attribute("ft_handler.request_id", told.trace.request_id)
        if told.error:
            span.set_attribute("error.type", told.error)
        if told.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        if told.begin < told.laps[0].begin:
            self._child("queue", told.begin, told.laps[0].begin, inside)
        for stage, begin, end in told.laps:
            self._child(stage, begin, end, inside)

    def _child(self, name: str, begin: float, end: float, inside: Any) -> None:
        child = self._tracer.start_span(name, context=inside, start_time=_nanoseconds(begin))
        child.end(_nanoseconds(end))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
