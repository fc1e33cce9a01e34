"""Trace context and request ids taken over and returned, Server-Timing, and spans."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time

import pytest
from fakes import AsyncEngine, FakeEngine, pipeline_of

from ft_handler.errors import MalformedRequest
from ft_handler.request import spans as spans_module
from ft_handler.request.spans import Spans
from ft_handler.request.tracing import Journal, new_request_id, trace_of
from ft_handler.stats import STAGES
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming, Trace

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SECRET = "zanzibar pelican"
TIMING = re.compile(
    r"(queue;dur=(?P<queue>\d+\.\d\d), )?tokenize;dur=(?P<tokenize>\d+\.\d\d), "
    r"compute;dur=(?P<compute>\d+\.\d\d), total;dur=(?P<total>\d+\.\d\d)"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


def timing(reply):
    """The Server-Timing of a reply, in milliseconds."""
    match = TIMING.fullmatch(reply.headers["Server-Timing"])
    assert match, reply.headers
    return {name: float(ms) for name, ms in match.groupdict().items() if ms is not None}


def sampled(reply):
    """What a reply's traceparent says of it."""
    return bool(int(reply.headers["traceparent"][-2:], 16) & 1)


# -- what headers say --


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        ({}, None),
        ({"Content-Type": "text/plain", "Connection": "close"}, None),
        ({"X-Request-Id": "a-1"}, Trace("a-1")),
        ({"x-request-id": "a:b/c=d@e+f.g_h"}, Trace("a:b/c=d@e+f.g_h")),
        ({"X-REQUEST-ID": "x" * 128}, Trace("x" * 128)),
        ({"TraceParent": TRACEPARENT}, Trace(traceparent=TRACEPARENT)),
        (
            {"traceparent": TRACEPARENT, "tracestate": "a=1", "x-request-ID": "q"},
            Trace("q", TRACEPARENT, "a=1"),
        ),
    ],
)
def test_names_of_headers_have_no_case(headers, trace):
    assert trace_of(headers) == trace


@pytest.mark.parametrize(
    "value", ["", " a", "a b", "a\r\nSet-Cookie: b", "\u00e9", "x" * 129, "<b>", {"type": "text"}]
)
def test_an_id_that_is_no_id_is_left_out(value):
    assert trace_of({"X-Request-Id": value}, request_id="own") == Trace("own")
    assert not trace_of({"X-Request-Id": value, "tracestate": "a=1"}).request_id


def test_new_ids_are_ids_and_differ():
    first, second = new_request_id(), new_request_id()
    assert first != second
    assert trace_of({"X-Request-Id": first}) == Trace(first)


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (TRACEPARENT, TRACEPARENT),
        (f"01-{TRACE}-{PARENT}-00-more", f"01-{TRACE}-{PARENT}-00"),
        (f"00-{TRACE}-{PARENT}-00-more", None),
        (f"01-{TRACE}-{PARENT}-00more", None),
        (f"ff-{TRACE}-{PARENT}-00", None),
        (f"00-{'0' * 32}-{PARENT}-00", None),
        (f"00-{TRACE}-{'0' * 16}-00", None),
        (TRACEPARENT.upper(), None),
        (TRACEPARENT[:-1], None),
        ("", None),
        ({}, None),
    ],
)
def test_only_a_valid_traceparent_is_taken_over(value, taken):
    trace = trace_of({"traceparent": value}, request_id="r")
    assert trace.traceparent == taken


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("t=1700000000.123", 1700000000.123),
        ("1700000000123", 1700000000.123),
        ("t=1700000000123456", 1700000000.123456),
        ("t=soon", 7.0),
        ("", 7.0),
        ("t=17000000001234567890", 7.0),
    ],
)
def test_a_proxy_may_say_when_a_request_arrived(value, seconds):
    trace = trace_of({"X-Request-Start": value}, arrived=7.0)
    assert trace.arrived == pytest.approx(seconds, abs=1e-5)


# -- what replies say --


def test_replies_return_what_came(tokenizer):
    pipeline = pipeline_of(tokenizer, FakeEngine())
    traces = [None, Trace("a", TRACEPARENT), Trace("b"), Trace(None, None, "a=1")]
    asked = [Incoming("a film"), Incoming("warm"), MalformedRequest("no"), Incoming(b"\xff")]
    replies, _ = pipeline.run(asked, traces=traces)
    assert [r.status for r in replies] == [200, 200, 400, 400]
    headers = [{k: v for k, v in r.headers.items() if k != "Server-Timing"} for r in replies]
    assert headers == [
        {},
        {"X-Request-Id": "a", "traceparent": TRACEPARENT},
        {"X-Request-Id": "b"},
        {},
    ]
    assert len({tuple(timing(r).items()) for r in replies}) == 1


def test_batches_of_nobody_have_no_headers(tokenizer):
    replies, _ = pipeline_of(tokenizer, FakeEngine()).run([Incoming("a film"), Incoming("")])
    assert [dict(r.headers) for r in replies] == [{}, {}]


def test_server_timing_says_what_the_batch_took(tokenizer):
    now = 0.0

    def clock():
        nonlocal now
        now += 0.001
        return now

    pipeline = pipeline_of(tokenizer, FakeEngine(), clock=clock)
    (reply,), stats = pipeline.run([Incoming("a film")], traces=[None])
    said = timing(reply)
    assert "queue" not in said
    assert said["tokenize"] == pytest.approx(1e3 * stats.seconds["tokenize"])
    assert said["compute"] == pytest.approx(1e3 * stats.seconds["compute"])
    assert said["total"] == pytest.approx(1e3 * sum(stats.seconds.values()))


def test_server_timing_has_the_wait_where_the_arrival_is_known(tokenizer):
    pipeline = pipeline_of(tokenizer, FakeEngine())
    now = time.time()
    arrivals = [now - 2, now + 0.5, now + 1000, now - 10_000, None]
    traces = [Trace(arrived=at) for at in arrivals]
    replies, _ = pipeline.run([Incoming("a film")] * 5, traces=traces)
    waits = [timing(r).get("queue") for r in replies]
    assert waits[0] >= 2000
    assert waits[1:] == [0, None, None, None]


def test_server_timing_is_a_setting(tokenizer):
    pipeline = pipeline_of(tokenizer, FakeEngine(), server_timing=False)
    replies, _ = pipeline.run(
        [Incoming("a film")] * 2, traces=[None, Trace("a", arrived=time.time())]
    )
    assert [dict(r.headers) for r in replies] == [{}, {"X-Request-Id": "a"}]


# -- spans --


class Collected:
    """A tracer whose spans stay in memory."""

    def __init__(self, **options):
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.memory = InMemorySpanExporter()
        provider = TracerProvider(**options)
        provider.add_span_processor(SimpleSpanProcessor(self.memory))
        self.tracer = provider.get_tracer("test")

    def pipeline(self, tokenizer, engine, **settings):
        model = {"model_name": "m", "model_version": "2.0"}
        pipeline = pipeline_of(tokenizer, engine, **settings)
        pipeline._spans = Spans(self.tracer, "predict", model)
        return pipeline

    @property
    def spans(self):
        return self.memory.get_finished_spans()

    @property
    def servers(self):
        """The requests' own spans, in the order of the batch."""
        return [s for s in self.spans if s.name == "predict m"]

    def children(self, span):
        return [s for s in self.spans if s.parent and s.parent.span_id == span.context.span_id]


@pytest.fixture
def collected():
    pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry's SDK is not installed")
    return Collected()


def test_a_request_is_a_span_below_its_caller(tokenizer, collected):
    from opentelemetry.trace import SpanKind, StatusCode

    pipeline = collected.pipeline(tokenizer, FakeEngine())
    asked = [Incoming(["a film", "warm"]), Incoming(b"\xff"), Incoming("a good film")]
    traces = [trace_of({"traceparent": TRACEPARENT, "X-Request-Id": "r"}), None, None]
    replies, _ = pipeline.run(asked, traces=traces)
    first, second, third = collected.servers
    assert {s.kind for s in collected.servers} == {SpanKind.SERVER}
    assert f"{first.context.trace_id:032x}" == TRACE
    assert f"{first.parent.span_id:016x}" == PARENT
    assert second.parent is None
    assert len({s.context.trace_id for s in collected.servers}) == 3
    assert dict(first.attributes) == {
        "ft_handler.model_name": "m",
        "ft_handler.model_version": "2.0",
        "ft_handler.sequences": 2,
        "ft_handler.tokens": 4 + 3,
        "ft_handler.batch_requests": 3,
        "ft_handler.request_id": "r",
        "http.response.status_code": 200,
    }
    assert second.attributes["http.response.status_code"] == 400
    assert second.attributes["error.type"] == "MalformedRequest"
    assert second.attributes["ft_handler.tokens"] == 0
    assert third.attributes["ft_handler.tokens"] == 5
    assert {s.status.status_code for s in collected.servers} == {StatusCode.UNSET}
    # The reply names the span, so that a client can find it.
    for span, reply in zip(collected.servers, replies, strict=True):
        ids = f"{span.context.trace_id:032x}-{span.context.span_id:016x}"
        assert reply.headers["traceparent"][:-2] == f"00-{ids}-"
        assert sampled(reply)


def test_stages_are_children_in_their_order(tokenizer, collected):
    pipeline = collected.pipeline(tokenizer, FakeEngine())
    pipeline.run([Incoming("a film")], traces=[Trace(arrived=time.time() - 0.25)])
    (server,) = collected.servers
    children = collected.children(server)
    names = [c.name for c in children]
    assert list(dict.fromkeys(names)) == ["queue", *STAGES]
    assert children[0].start_time == server.start_time
    assert children[0].end_time - children[0].start_time >= 240_000_000
    assert children[-1].end_time == server.end_time
    for before, after in itertools.pairwise(children):
        assert before.end_time == after.start_time
    assert abs(server.end_time - time.time_ns()) < 60e9


def test_parts_that_overlap_are_children_of_their_own(tokenizer, collected):
    pipeline = collected.pipeline(tokenizer, AsyncEngine())
    pipeline.run([Incoming("film " * 5000)] * 6, traces=[None] * 6)
    (first, *_) = collected.servers
    names = [c.name for c in collected.children(first)]
    assert names.count("tokenize") == 3
    assert names.count("decode") == names.count("encode") == 1


def test_a_failure_of_ours_is_an_error(tokenizer, collected):
    from opentelemetry.trace import StatusCode

    def fail(batch):
        raise RuntimeError(SECRET)

    pipeline = collected.pipeline(tokenizer, FakeEngine(fail=fail))
    (reply,), _ = pipeline.run([Incoming("a film")], traces=[None])
    (server,) = collected.servers
    assert reply.status == 500
    assert server.status.status_code is StatusCode.ERROR
    assert server.attributes["error.type"] == "InternalError"


def test_spans_say_nothing_of_what_was_asked(tokenizer, collected):
    pipeline = collected.pipeline(tokenizer, FakeEngine())
    headers = {"X-Request-Id": SECRET, "traceparent": SECRET, "X-Other": SECRET}
    asked = [Incoming(SECRET), Incoming({"text": SECRET, SECRET: 1}), Incoming([SECRET, 3])]
    replies, _ = pipeline.run(asked, traces=[trace_of(headers)] * 3)
    assert [r.status for r in replies] == [200, 400, 422]
    assert len(collected.servers) == 3
    assert SECRET not in "".join(s.to_json() for s in collected.spans)
    assert SECRET not in str([r.headers for r in replies])


def test_sampling_is_respected(tokenizer):
    sampling = pytest.importorskip("opentelemetry.sdk.trace.sampling")
    collected = Collected(sampler=sampling.ParentBased(sampling.ALWAYS_OFF))
    pipeline = collected.pipeline(tokenizer, FakeEngine())
    unsampled = TRACEPARENT[:-1] + "0"
    traces = [trace_of({"traceparent": t}) for t in (TRACEPARENT, unsampled)] + [None]
    replies, _ = pipeline.run([Incoming("a film")] * 3, traces=traces)
    (server,) = collected.servers
    assert f"{server.context.trace_id:032x}" == TRACE
    assert [r.headers["traceparent"][:35] for r in replies[:2]] == [f"00-{TRACE}"] * 2
    assert [sampled(r) for r in replies] == [True, False, False]


def test_a_tracing_system_that_fails_costs_nobody_an_answer(tokenizer, collected, caplog):
    class Broken:
        def start_span(self, *_, **__):
            raise RuntimeError(SECRET)

    collected.tracer = Broken()
    pipeline = collected.pipeline(tokenizer, FakeEngine())
    traces = [Trace("a", TRACEPARENT), None]
    replies, _ = pipeline.run([Incoming("a film")] * 2, traces=traces)
    assert [r.status for r in replies] == [200, 200]
    assert replies[0].headers["traceparent"] == TRACEPARENT
    assert "tracing failed: RuntimeError" in caplog.text
    assert SECRET not in caplog.text


def test_without_spans_nothing_is_written_down(tokenizer):
    journal = Journal([None], time.perf_counter, timing=True, spans=None)
    assert journal.laps is None


# -- whether there are spans --


@pytest.fixture
def unset(monkeypatch):
    """OpenTelemetry as it is in a fresh process."""
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    trace = pytest.importorskip("opentelemetry.trace", reason="OpenTelemetry is not installed")
    from opentelemetry.util._once import Once

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    return trace


def test_nobody_asked_for_spans(unset, monkeypatch):
    assert spans_module.tracer() is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert spans_module.tracer() is None


def test_what_nobody_asked_for_is_not_loaded():
    program = (
        "import sys; from ft_handler.request import spans; spans.tracer(); "
        "print(sum(name.startswith('opentelemetry') for name in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert ran.stdout == "0\n", ran.stderr


def test_the_variables_of_opentelemetry_set_it_up(unset, monkeypatch):
    pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry's SDK is not installed")
    for name, value in {
        "OTEL_TRACES_EXPORTER": "console",
        "OTEL_SERVICE_NAME": "sentiment",
        "OTEL_TRACES_SAMPLER": "always_off",
    }.items():
        monkeypatch.setenv(name, value)
    assert spans_module.tracer() is not None
    provider = unset.get_tracer_provider()
    try:
        assert provider.resource.attributes["service.name"] == "sentiment"
        assert "AlwaysOff" in provider.sampler.get_description()
    finally:
        provider.shutdown()


def test_an_exporter_that_is_not_installed_is_said(unset, monkeypatch, caplog):
    pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry's SDK is not installed")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setattr(spans_module, "entry_points", lambda **_: ())
    assert spans_module.tracer() is None
    assert "exporter 'otlp'" in caplog.text


@pytest.mark.parametrize(
    ("protocol", "names"),
    [
        (None, ["otlp_proto_grpc", "otlp_proto_http"]),
        ("grpc", ["otlp_proto_grpc"]),
        ("http/protobuf", ["otlp_proto_http"]),
    ],
)
def test_the_protocol_chooses_the_exporter(monkeypatch, protocol, names):
    asked = []
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL", raising=False)
    if protocol:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setattr(spans_module, "entry_points", lambda group, name: asked.append(name) or ())
    assert spans_module._exporter("otlp") is None
    assert asked == names


def test_what_the_process_has_set_up_is_used(unset):
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    provider = sdk.TracerProvider()
    unset.set_tracer_provider(provider)
    tracer = spans_module.tracer()
    assert tracer.resource is provider.resource


def test_a_missing_package_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    assert spans_module.tracer() is None
    assert "ft-handler[tracing]" in caplog.text
    caplog.clear()
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    assert spans_module.tracer() is None
    assert not caplog.text
