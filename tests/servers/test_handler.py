"""The TorchServe side: loading an archive's folder, answers through the context, metrics."""

from __future__ import annotations

import gc
import json
import time
import warnings

import pytest
from fakes import FakeContext, FakeEngine, model_info

from ft_handler import runtime
from ft_handler.errors import ConfigError, EngineLost
from ft_handler.servers.torchserve import handler as handler_module
from ft_handler.servers.torchserve import metrics
from ft_handler.servers.torchserve.handler import load
from ft_handler.servers.torchserve.metrics import METRICS
from ft_handler.servers.torchserve.settings import RESPONSE_VARIABLE, TorchServeSettings
from ft_handler.stats import STAGES


@pytest.fixture(scope="module", autouse=True)
def _torchserve():
    """Import TorchServe once: it leaves a file open, which is no failure of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("ts.metrics.metric_type_enum")
        gc.collect()


@pytest.fixture
def archive(tiny_tokenizer, tmp_path, monkeypatch):
    """An extracted archive whose engine is a fake."""
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).write_bytes((tiny_tokenizer / name).read_bytes())
    (tmp_path / "traced_model.pt").write_bytes(b"")
    monkeypatch.setattr(runtime, "read_info", lambda path: model_info())
    monkeypatch.setattr(runtime, "read_tokenizer", lambda path: None)
    monkeypatch.setattr(runtime, "load_model", lambda path, device, folder: None)
    monkeypatch.setattr(runtime, "engine_for", lambda model, device, **_: FakeEngine())
    return tmp_path


def ready(archive, section=None):
    settings = {"fast_receive": False, **(section or {})}
    context = FakeContext(str(archive), {"handler": settings}, batch_size=8)
    return load(context), context


def test_a_batch_gets_its_bodies_and_statuses(archive):
    handler, context = ready(archive)
    bodies = handler.handle(
        [{"body": "a film"}, {"body": bytearray(b"")}, {"body": ["a"]}], context
    )
    assert [type(b) for b in bodies] == [bytes] * 3
    assert context.statuses == {1: 400}
    assert context.content_types == dict.fromkeys(range(3), "application/json")
    assert json.loads(bodies[0])["label"] in ("negative", "neutral", "positive")
    assert json.loads(bodies[1])["code"] == 400
    assert len(json.loads(bodies[2])) == 1


def test_what_is_no_prediction_is_answered_as_what_it_is(archive):
    handler, context = ready(archive)
    context.request_headers = {
        0: {"Host": "x", "explain": "True"},
        2: {"Host": "x", "describe": "True"},
        3: {"Host": "x", "explain": "no"},
    }
    asked = [{"body": "a film"}, {"body": "a film"}, {}, {"body": {"text": "film"}}, {}]
    bodies = [json.loads(b) for b in handler.handle(asked, context)]
    assert context.statuses == {0: 501, 4: 400}
    assert bodies[0]["type"] == "NotOffered"
    assert "explanations" in bodies[0]["message"]
    assert ["label" in body for body in bodies] == [False, True, False, True, False]
    assert bodies[2] == json.loads(model_info().to_json())


def test_explanations_are_answered_where_they_are_switched_on(archive):
    handler, context = ready(archive, {"captum_explanation": True})
    context.request_headers = {i: {"Host": "x", "explain": "True"} for i in (0, 2, 3, 5)} | {
        4: {"Host": "x", "describe": "True"}
    }
    asked = [
        {"body": "a good film"},
        {"body": "a good film"},
        {"body": {"text": "a good film", "target": "neutral"}},
        {"body": {"text": "a good film", "target": "dreadful"}},
        {},
        {"body": {"instances": ["a good film", {"data": "warm", "target": 0}]}},
    ]
    bodies = [json.loads(b) for b in handler.handle(asked, context)]
    assert context.statuses == {3: 422}
    assert bodies[0]["words"] == ["a", "good", "film"]
    assert len(bodies[0]["importances"]) == 3
    assert {k: bodies[0][k] for k in ("label", "score")} == bodies[1]
    assert bodies[2]["label"] == "neutral"
    assert bodies[3]["type"] == "UnusableRequest"
    assert bodies[4] == json.loads(model_info().to_json())
    first, second = bodies[5]["explanations"]
    assert first == bodies[0]
    assert (second["words"], second["label"]) == (["warm"], "negative")
    handler._reporter.flush()
    emitted = {name: value for name, value, *_ in context.emitted if value}
    assert emitted["ft_requests_total"] == 5
    # Of each explanation n words make n + 2 sequences of n + 2 tokens.
    assert emitted["ft_tokens_total"] == 5 + 3 * 25 + 9
    assert emitted["ft_refused_total"] == 1


def test_explanations_get_what_predictions_leave_of_the_work(archive):
    handler, context = ready(archive, {"captum_explanation": True, "max_work_tokens": 25})
    context.request_headers = {0: {"Host": "x", "explain": "True"}}
    asked = [{"body": "a good film"}, {"body": "warm"}]
    handler.handle(asked[:1], context)
    assert context.statuses == {}
    bodies = [json.loads(b) for b in handler.handle(asked, context)]
    assert context.statuses == {0: 503}
    assert "label" in bodies[1]


def test_a_batch_may_hold_no_prediction_at_all(archive):
    handler, context = ready(archive)
    context.request_headers = {0: {"Host": "x", "describe": "True"}}
    (body,) = handler.handle([{}], context)
    assert json.loads(body)["mode"] == "sequence_classification"


def test_the_manifest_names_the_traced_file(archive, monkeypatch):
    (archive / "traced_model.pt").rename(archive / "other.pt")
    asked = []
    monkeypatch.setattr(runtime, "read_info", lambda path: asked.append(path.name) or model_info())
    context = FakeContext(str(archive), {"handler": {"fast_receive": False}})
    context.manifest["model"]["serializedFile"] = "other.pt"
    load(context)
    assert set(asked) == {"other.pt"}
    asked.clear()
    (archive / "set.pt").write_bytes(b"")
    context.model_yaml_config["handler"]["model_file"] = "set.pt"
    load(context)
    assert set(asked) == {"set.pt"}
    del context.model_yaml_config["handler"]["model_file"]
    context.manifest["model"]["serializedFile"] = "gone.pt"
    with pytest.raises(ConfigError, match=r"gone\.pt \(the manifest's serializedFile\)"):
        load(context)


def test_labels_come_from_the_archive(archive):
    names = {"0": "bad", "1": "so so", "2": "good"}
    (archive / "index_to_name.json").write_text(json.dumps(names))
    handler, context = ready(archive)
    (body,) = handler.handle([{"body": {"text": "a", "top_k": None}}], context)
    assert {a["label"] for a in json.loads(body)} == set(names.values())


def test_mistakes_stop_the_worker_and_are_logged(archive, caplog):
    with pytest.raises(ConfigError, match="max_lenght"):
        ready(archive, {"max_lenght": 5})
    assert "cannot serve fake" in caplog.text
    assert "max_lenght" in caplog.text
    (archive / "traced_model.pt").unlink()
    with pytest.raises(ConfigError, match=r"traced_model\.pt"):
        ready(archive)


class Timer:
    """A timer that goes off when the test says so."""

    def __init__(self):
        self.calls = []

    def __call__(self, seconds, call):
        assert seconds == metrics.INTERVAL
        self.made = call
        return self

    def start(self):
        self.calls.append(self.made)


@pytest.fixture
def timer(monkeypatch):
    timer = Timer()
    monkeypatch.setattr(metrics.Reporter.__init__, "__defaults__", (timer,))
    return timer


def test_times_are_emitted_once_a_batch_and_counts_together(archive, timer):
    handler, context = ready(archive)
    context.emitted.clear()
    for _ in range(3):
        handler.handle([{"body": "a film"}, {"body": "film"}, {"body": bytearray()}], context)
    times = [(name, kind, labels) for name, _, _, kind, labels in context.emitted]
    assert (
        times
        == [
            ("ft_host_seconds", "histogram", {}),
            ("ft_compute_seconds", "histogram", {}),
        ]
        * 3
    )
    context.emitted.clear()
    (flush,) = timer.calls
    flush()
    emitted = {(name, *labels.items()): rest for name, *rest, labels in context.emitted}
    assert len(emitted) == len(context.emitted)
    assert emitted["ft_requests_total",] == [9, "count", "counter"]
    assert emitted["ft_tokens_total",] == [3 * (4 + 3), "count", "counter"]
    assert emitted["ft_launches_total",] == [3, "count", "counter"]
    assert emitted["ft_padding_avoided_total",] == [3, "count", "counter"]
    assert emitted["ft_refused_total", ("Reason", "MalformedRequest")] == [3, "count", "counter"]
    stages = {labels["Stage"] for *_, labels in context.emitted if "Stage" in labels}
    assert stages == set(STAGES)
    names = {name for name, *_ in emitted}
    assert not names & {"ft_failed_total", "ft_undecodable_total", "ft_batch_size"}
    assert names <= {m.name for m in METRICS}


def test_every_counter_is_there_from_the_start(archive):
    _, context = ready(archive)
    emitted = {
        (name, *labels.values()): (value, kind) for name, value, _, kind, labels in context.emitted
    }
    assert emitted.pop(("ft_batch_size",)) == (8, "gauge")
    assert emitted.pop(("ft_max_batch_tokens",)) == (16384, "gauge")
    assert set(emitted.values()) == {(0, "counter")}
    assert {name for name, *_ in emitted} == {m.name for m in METRICS if m.kind == "counter"}
    assert ("ft_refused_total", "UnusableRequest") in emitted
    assert ("ft_failed_total", "Overloaded") in emitted


def test_counts_go_on_where_they_were_handed_over(archive, timer):
    handler, context = ready(archive)
    context.emitted.clear()
    for _ in range(2):
        handler.handle([{"body": "a film"}], context)
        timer.calls.pop()()
    assert [value for name, value, *_ in context.emitted if name == "ft_requests_total"] == [1, 1]
    count = len(context.emitted)
    handler._reporter.flush()
    assert len(context.emitted) == count


def test_counts_are_handed_over_without_another_batch(archive, monkeypatch):
    monkeypatch.setattr(metrics, "INTERVAL", 0.01)
    handler, context = ready(archive)
    context.emitted.clear()
    handler.handle([{"body": "a film"}], context)
    deadline = time.monotonic() + 30
    while "ft_requests_total" not in [name for name, *_ in context.emitted]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_error_is_a_reason(archive, timer):
    """Reasons are names of types: nobody can make more of them."""
    handler, context = ready(archive, {"max_inputs_per_request": 2, "max_work_tokens": 20})
    context.request_headers = {
        4: {"Host": "x", "explain": "True"},
        5: {"Host": "x", "Content-Encoding": "gzip"},
    }
    bodies = [bytearray(b"\xff"), ["a"] * 3, [3], "film " * 50, "a", bytearray(b"a")]
    handler.handle([{"body": body} for body in bodies], context)
    assert context.statuses == {0: 400, 1: 413, 2: 422, 3: 413, 4: 501, 5: 415}
    timer.calls.pop()()
    reasons = {
        (name, labels["Reason"]): value
        for name, value, *_, labels in context.emitted
        if "Reason" in labels and value
    }
    assert reasons == {
        ("ft_refused_total", "MalformedRequest"): 1,
        ("ft_refused_total", "RequestTooLarge"): 2,
        ("ft_refused_total", "UnusableRequest"): 1,
        ("ft_refused_total", "UnsupportedMedia"): 1,
        ("ft_failed_total", "NotOffered"): 1,
    }
    known = {
        metrics.REFUSED.name: metrics.REFUSED.labels,
        metrics.FAILED.name: metrics.FAILED.labels,
    }
    assert all(reason in known[name] for name, reason in reasons)
    assert not set(metrics.REFUSED.labels) & set(metrics.FAILED.labels)


def test_undecodable_bodies_are_a_metric(archive, timer):
    handler, context = ready(archive)
    handler_module.receive.undecodable.add()
    handler.handle([{"body": "a film"}], context)
    handler.handle([{"body": "a film"}], context)
    timer.calls.pop()()
    values = [value for name, value, *_ in context.emitted if name == "ft_undecodable_total"]
    assert values == [0, 1]


def test_a_stream_of_grpc_ends_and_http_is_left_alone(archive):
    """What TorchServe keeps as headers: a dict an input, and a text for every header of HTTP."""
    handler, context = ready(archive)
    kept = {"data": {"content-type": ""}}
    context.request_headers = {0: kept, 1: {**kept, "content-length": "0"}, 2: {}}
    handler.handle([{"data": b"a film"}, {"data": b""}, {"data": b""}], context)
    said = context.response_headers
    assert [said[index] for index in (0, 2)] == [{"ts_stream_next": "false"}] * 2
    assert set(said[1]) == {"Server-Timing"}


def test_what_names_a_request_goes_back_to_its_client(archive):
    handler, context = ready(archive, {"server_timing": False, "captum_explanation": True})
    traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    named = {"Host": "x", "X-Request-ID": "a", "Traceparent": traceparent}
    context.request_headers = {
        0: named,
        1: {"Host": "x", "x-request-id": "b c"},
        2: {**named, "x-request-id": "c", "X-Request-ID": {"content-type": ""}, "explain": "True"},
        3: {**named, "describe": "True"},
    }
    handler.handle([{"body": "a film"}, {}, {"body": "film"}, {}], context)
    # TorchServe writes over X-Request-Id.
    assert context.response_headers == {
        0: {"X-Client-Request-Id": "a", "traceparent": traceparent},
        2: {"X-Client-Request-Id": "c", "traceparent": traceparent},
    }


@pytest.mark.parametrize("name", ["body", "json", "kserve", "kservev2"])
def test_an_envelope_is_refused_at_load(archive, name, caplog, monkeypatch):
    """Through TorchServe's own loader, which is the only one that knows of it."""
    from ts.model_loader import TsModelLoader

    monkeypatch.setattr(handler_module, "open_model", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ConfigError, match=f"service_envelope.*'{name}'"):
        TsModelLoader().load("m", str(archive), "ft_handler.entry:handle", None, 8, name)
    assert "leave it out" in caplog.text


def test_without_an_envelope_the_loader_loads(archive):
    from ts.model_loader import TsModelLoader

    for none in (None, ""):
        assert handler_module.envelope.refuse(none) is None
    service = TsModelLoader().load("m", str(archive), "ft_handler.entry:handle", None, 8)
    assert service.context.model_name == "m"


def test_metrics_can_be_switched_off(archive, timer):
    handler, context = ready(archive, {"metrics": False})
    handler.handle([{"body": "a film"}], context)
    assert timer.calls == []
    assert context.emitted == []


def test_a_lost_device_ends_the_worker(archive, monkeypatch):
    handler, context = ready(archive)

    def lost(data, traces):
        raise EngineLost("gone")

    monkeypatch.setattr(handler._pipeline, "run", lost)
    with pytest.raises(SystemExit):
        handler.handle([{"body": "a"}], context)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_receive_path_is_a_setting(archive, monkeypatch, wanted):
    calls = []
    monkeypatch.setattr(handler_module.receive, "install", lambda: calls.append(1))
    ready(archive, {"fast_receive": wanted})
    assert bool(calls) is wanted


def test_the_entry_point_initialises_then_answers(archive):
    from ft_handler.entry import handle

    context = FakeContext(str(archive), {"handler": {"fast_receive": False}})
    assert handle(None, context) is None
    (body,) = handle([{"body": "a film"}], context)
    assert "label" in json.loads(body)


def test_entry_offers_torchserve_a_function_and_no_class():
    import inspect

    from ft_handler import entry

    classes = inspect.getmembers(
        entry, lambda m: inspect.isclass(m) and m.__module__ == entry.__name__
    )
    assert classes == []


def test_an_answer_that_is_too_long_for_the_front_is_refused(archive, timer, monkeypatch):
    handler, context = ready(archive, {"max_response_size": 200})
    bodies = ["a film", ["a film"] * 20, "a plot"]
    answers = handler.handle([{"body": body} for body in bodies], context)
    assert context.statuses == {1: 413}
    assert "the limit is 200" in json.loads(answers[1])["message"]
    assert json.loads(answers[0])["label"]
    # Where nobody says it, the server's own word counts, else TorchServe's default.
    settings = TorchServeSettings()
    monkeypatch.delenv(RESPONSE_VARIABLE, raising=False)
    assert settings.most_bytes() == 6_553_500
    monkeypatch.setenv(RESPONSE_VARIABLE, "300")
    assert settings.most_bytes() == 300
    assert TorchServeSettings(max_response_size=200).most_bytes() == 200


def test_what_is_ready_is_said_once(archive, caplog):
    caplog.set_level("INFO")
    ready(archive)
    said = [r.getMessage() for r in caplog.records if " ready in " in r.getMessage()]
    (line,) = said
    assert line.startswith("fake ready in ")
    assert line.endswith(": sequence_classification, fp32, 2 layers of 64, on cpu")
