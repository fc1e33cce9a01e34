"""The exporter of queues and workers, over a management API that the test plays."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from email.message import Message
from typing import Any

import pytest
from ports import free_port

pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")

from prometheus_client import CollectorRegistry, generate_latest

from ft_handler.errors import ConfigError, EnvironmentProblem
from ft_handler.servers.torchserve.exporter import COUNTERS, GAUGES, Collector, Exporter


def version(name: str, version: str = "1.0", waiting: int = 0, **workers: Any) -> dict[str, Any]:
    """A description; workers are id=(pid, status)."""
    return {
        "modelName": name,
        "modelVersion": version,
        "workers": [{"id": i, "pid": p, "status": s} for i, (p, s) in workers.items()],
        "jobQueueStatus": {"remainingCapacity": 100 - waiting, "pendingRequests": waiting},
    }


class Management:
    """A management API: model -> versions."""

    def __init__(self, **models: list[dict[str, Any]]) -> None:
        self.models = models
        self.failure: Exception | None = None

    def __call__(self, path: str) -> Any:
        if self.failure is not None:
            raise self.failure
        if path.startswith("/models?"):
            return {"models": [{"modelName": name} for name in self.models]}
        (name,) = re.findall("^/models/(.*)/all$", path)
        if not self.models[name]:
            raise urllib.error.HTTPError(path, 404, "Not Found", Message(), None)
        return self.models[name]


def scraped(collector: Collector) -> dict[str, float]:
    """What Prometheus would read: a series to its value."""
    registry = CollectorRegistry()
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {series: float(value) for series, _, value in pairs}


def test_every_version_has_its_queue_and_workers() -> None:
    api = Management(
        a=[version("a", "2.0", 7, w1=(1, "READY"), w2=(2, "UNLOADING")), version("a", "1.0")],
        b=[version("b", w1=(3, "READY"))],
    )
    found = scraped(Collector(api))
    labels = 'ModelName="a",ModelVersion="2.0"'
    assert found[f"ft_queue_depth{{{labels}}}"] == 7
    assert found[f"ft_queue_capacity{{{labels}}}"] == 100
    assert found[f"ft_workers{{{labels}}}"] == 2
    assert found[f"ft_workers_ready{{{labels}}}"] == 1
    assert found['ft_workers_ready{ModelName="a",ModelVersion="1.0"}'] == 0
    assert found['ft_workers_ready{ModelName="b",ModelVersion="1.0"}'] == 1
    assert found["ft_up"] == 1
    assert {series.partition("{")[0] for series in found} == {*GAUGES, *COUNTERS}


def test_another_process_is_a_restart() -> None:
    api = Management(a=[version("a", w1=(1, "READY"), w2=(2, "READY"))])
    collector = Collector(api)
    series = 'ft_worker_restarts_total{ModelName="a",ModelVersion="1.0"}'
    counts = []
    for workers in (
        {"w1": (1, "READY"), "w2": (2, "READY")},
        {"w1": (5, "READY"), "w2": (2, "READY")},
        {"w1": (-1, "UNLOADED"), "w2": (6, "READY")},
        {"w1": (-1, "UNLOADED"), "w2": (6, "READY")},
        {"w1": (7, "READY"), "w2": (6, "READY")},
        {"w1": (7, "READY"), "w2": (6, "READY"), "w3": (8, "READY")},  # scaled up
        {"w1": (7, "READY")},
    ):
        api.models["a"] = [version("a", **workers)]
        counts.append(scraped(collector)[series])
    assert counts == [0, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("refused"), TimeoutError(), ValueError("no JSON")]
)
def test_a_server_that_does_not_answer_is_down(failure: Exception) -> None:
    api = Management(a=[version("a")])
    collector = Collector(api)
    api.failure = failure
    assert scraped(collector) == {"ft_up": 0}
    api.failure = None
    assert scraped(collector)["ft_up"] == 1


def test_a_model_that_is_unregistered_meanwhile_is_left_out() -> None:
    found = scraped(Collector(Management(a=[], b=[version("b")])))
    assert found["ft_up"] == 1
    assert not [series for series in found if '"a"' in series]


class Server:
    """As much of a `process.Server` as an exporter asks."""

    management = "http://127.0.0.1:1"
    metrics = "unix:/tmp/metrics"

    def request(self, url: str, timeout: float) -> Any:
        path = url.removeprefix(self.management)
        return Management(a=[version("a", waiting=3)])(path)


def test_it_is_served_until_it_is_stopped() -> None:
    port = free_port(1)
    exporter = Exporter.of(Server(), port)  # type: ignore[arg-type]
    exporter.start()
    try:
        with urllib.request.urlopen(f"{exporter.address}/metrics", timeout=30) as answer:
            assert 'ft_queue_depth{ModelName="a",ModelVersion="1.0"} 3.0' in answer.read().decode()
        another = Exporter.of(Server(), port)  # type: ignore[arg-type]
        with pytest.raises(EnvironmentProblem, match=f"127.0.0.1:{port} .--exporter-port"):
            another.start()
        another.stop()
    finally:
        exporter.stop()
    exporter.stop()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port))


def test_it_listens_where_the_metrics_do() -> None:
    server = Server()
    server.metrics = "http://0.0.0.0:8082"
    assert Exporter.of(server, 8083).address == "http://0.0.0.0:8083"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--exporter-port"):
        Exporter.of(server, 0)  # type: ignore[arg-type]


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(EnvironmentProblem, match=r"ft-handler\[exporter\]"):
        Exporter.of(Server(), 8083).start()  # type: ignore[arg-type]
