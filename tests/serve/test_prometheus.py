"""A real Prometheus watches a real `ft-handler serve`: every query of ours has an answer."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from monitoring import ALERTS, FOLDER, dashboard_queries, metrics_in, program, rules
from ports import free_port

pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")

SENTENCE = "the film was great"
SECRET = "zanzibar pelican 48151623"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def until(what: Callable[[], Any], message: object = "", timeout: float = 60) -> Any:
    """Wait for something that is true, and return it."""
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, message
        time.sleep(0.1)
    return found


class Watched:
    """A server, as `ft-handler serve --exporter-port` runs it with its keys, and its Prometheus."""

    def __init__(self, folder: Path, ports: int, prometheus: int) -> None:
        self.folder, self.ports = folder, ports
        self.exporter = f"http://127.0.0.1:{ports + 5}/metrics"
        self.log = folder / "log"
        self._prometheus = f"http://127.0.0.1:{prometheus}/api/v1"

    @property
    def written(self) -> str:
        """What the server has written until now."""
        return self.log.read_text(encoding="utf-8")

    def _headers(self, purpose: str) -> dict[str, str]:
        key = json.loads((self.folder / "key_file.json").read_text())[purpose]["key"]
        return {"Authorization": f"Bearer {key}"}

    def post(self, path: str, body: object, **headers: str) -> requests.Response:
        """Ask for a prediction or an explanation."""
        data = body if isinstance(body, (str, bytes)) else json.dumps(body)
        kind = "text/plain" if isinstance(body, (str, bytes)) else "application/json"
        return requests.post(
            f"http://127.0.0.1:{self.ports}/{path}",
            data=data,
            headers={**self._headers("inference"), "Content-Type": kind, **headers},
            timeout=60,
        )

    def pid(self) -> int:
        """The one worker's."""
        url = f"http://127.0.0.1:{self.ports + 1}/models/cls"
        answer = requests.get(url, headers=self._headers("management"), timeout=60).json()
        return int(answer[0]["workers"][0]["pid"])

    def query(self, query: str) -> list[dict[str, Any]]:
        """What Prometheus answers: series with a value each."""
        answer = requests.get(f"{self._prometheus}/query", params={"query": query}, timeout=60)
        document = answer.json()
        assert document["status"] == "success", (query, document)
        assert not document.get("warnings"), (query, document)
        return list(document["data"]["result"])

    def value(self, query: str) -> float:
        """The value of the only series, 0 when there is none."""
        found = self.query(query)
        assert len(found) < 2, found
        return float(found[0]["value"][1]) if found else 0.0

    def get(self, path: str) -> Any:
        """Another part of Prometheus' API."""
        return requests.get(f"{self._prometheus}/{path}", timeout=60).json()["data"]


@pytest.fixture(scope="module")
def watched(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Everything started, and stopped at the end."""
    binary = program("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    ports, prometheus = free_port(6), free_port(1)
    configuration = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in configuration["scrape_configs"]:
        (targets,) = job["static_configs"]
        own = {"torchserve:8082": ports + 2, "torchserve:8084": ports + 5}
        targets["targets"] = [f"127.0.0.1:{own[target]}" for target in targets["targets"]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    (folder / "alerts.yml").write_text(ALERTS.read_text())
    serve = [
        sys.executable, "-m", "ft_handler", "serve", "--models", "cls.mar", "--model-store",
        str(store), "--port", str(ports), "--grpc-port", str(ports + 3), "--exporter-port",
        str(ports + 5),
    ]  # fmt: skip
    watch = [
        binary, "--config.file=prometheus.yml", "--storage.tsdb.path=series",
        f"--web.listen-address=127.0.0.1:{prometheus}", "--log.level=warn",
    ]  # fmt: skip
    tracing = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with (folder / "log").open("w") as log, (folder / "prometheus.log").open("w") as other:
        processes = [
            subprocess.Popen(
                serve, cwd=folder, stdout=log, stderr=log, env={**os.environ, **tracing}
            ),
            subprocess.Popen(watch, cwd=folder, stdout=other, stderr=other),
        ]
        try:
            watched = Watched(folder, ports, prometheus)

            def ready() -> bool:
                assert processes[0].poll() is None, watched.written
                return "Ctrl-C stops the server" in watched.written

            until(ready, "not ready", 180)
            until(lambda: watched.value("ft_workers_ready") == 1, "not scraped")
            yield watched
        finally:
            for process in processes:
                process.terminate()
            codes = [process.wait(60) for process in processes]
    assert codes == [0, 0], watched.written


@pytest.fixture(scope="module")
def traffic(watched: Watched) -> dict[str, int]:
    """Requests of every outcome, for some seconds: the status and how often it was answered."""
    long = "film " * 51_000
    kinds: list[tuple[str, object, int]] = [
        ("predictions/cls", SENTENCE, 200),
        ("predictions/cls", [SENTENCE, SENTENCE * 9], 200),
        ("predictions/cls", b"\xff", 400),
        ("predictions/cls", {"text": long}, 413),
        ("predictions/cls", {"text": 3}, 422),
        ("explanations/cls", SENTENCE, 501),
    ]
    counts: dict[str, int] = {}
    begun = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        while time.monotonic() < begun + 4:
            answers = list(pool.map(lambda k: watched.post(k[0], k[1]).status_code, kinds))
            assert answers == [status for *_, status in kinds]
            for status in map(str, answers):
                counts[status] = counts.get(status, 0) + 1
    return counts


def test_every_request_is_counted_once(watched: Watched, traffic: dict[str, int]) -> None:
    total = 'ft_requests_total{ModelName="cls"}'
    until(lambda: watched.value(total) == sum(traffic.values()), watched.query(total))
    wanted = {
        "MalformedRequest": traffic["400"],
        "RequestTooLarge": traffic["413"],
        "UnusableRequest": traffic["422"],
        "UnsupportedMedia": 0,
    }

    def refused() -> dict[str, float]:
        found = watched.query("ft_refused_total")
        return {series["metric"]["Reason"]: float(series["value"][1]) for series in found}

    # A scrape may come between the lines of one report.
    until(lambda: refused() == wanted, (wanted, refused()))
    until(lambda: watched.value("sum(ft_failed_total)") == traffic["501"])
    assert watched.value('ft_failed_total{Reason="NotOffered"}') == traffic["501"]
    assert watched.value("ts_inference_requests_total") == sum(traffic.values())


def test_the_dashboard_has_figures(watched: Watched, traffic: dict[str, int]) -> None:
    until(lambda: watched.value("ft_requests_total") == sum(traffic.values()))
    for title, query in dashboard_queries("cls", "30s"):
        found = watched.query(query)
        assert found, (title, query)
        values = [float(series["value"][1]) for series in found]
        assert all(math.isfinite(value) and value >= 0 for value in values), (title, query, values)
    shares = [q for t, q in dashboard_queries("cls", "30s") if t.startswith(("Padding", "Batch, "))]
    assert [query for query in shares if not 0 < watched.value(query) < 1] == []
    assert watched.get("label/ModelName/values") == ["cls"]


def test_the_rules_are_evaluated(watched: Watched, traffic: dict[str, int]) -> None:
    for rule in rules():
        for name in metrics_in(rule["expr"]):
            assert watched.query(f"count({name})"), (rule, name)
    groups = until(
        lambda: [
            group
            for group in watched.get("rules")["groups"]
            if all(rule["health"] == "ok" for rule in group["rules"])
        ]
    )
    states = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert len(states) == len(rules())
    # Every other request is refused, which is no alert before it has lasted.
    assert watched.query(next(r["expr"] for r in rules() if r.get("alert") == "FtHandlerRefusals"))
    assert {name for name, rule in states.items() if rule.get("state") == "firing"} == set()
    assert watched.value("model_name:requests_in_flight:mean1m") > 0


def test_what_waits_is_seen_while_it_waits(watched: Watched) -> None:
    """A worker that stands still, and more requests than it takes at once."""
    assert watched.value("ft_queue_depth") == 0
    count, batch = 50, watched.value("ft_batch_size")
    pid = watched.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(count) as pool:
            calls = [pool.submit(watched.post, "predictions/cls", SENTENCE) for _ in range(count)]
            try:
                # The worker's socket holds one batch, whatever its size.
                until(lambda: watched.value("ft_queue_depth") >= count - batch, watched.written)
                assert watched.value("ft_queue_depth") < count
                assert watched.value("ft_queue_capacity") == 100
            finally:
                os.kill(pid, signal.SIGCONT)
            assert [call.result().status_code for call in calls] == [200] * count
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: watched.value("ft_queue_depth") == 0)
    # What has waited is what the means say afterwards.
    until(lambda: watched.value("model_name:requests_waiting:mean1m") > 0.1)


def test_a_request_is_followed_through_the_server(watched: Watched) -> None:
    pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry's SDK is not installed")
    answer = watched.post(
        "predictions/cls",
        SECRET,
        traceparent=f"00-{TRACE}-00f067aa0ba902b7-01",
        **{"X-Request-Id": "mine-1"},
    )
    assert answer.status_code == 200
    assert answer.headers["X-Client-Request-Id"] == "mine-1"
    assert re.fullmatch("[0-9a-f-]{36}", answer.headers["x-request-id"])
    own = re.fullmatch(rf"00-{TRACE}-([0-9a-f]{{16}})-[0-9a-f]{{2}}", answer.headers["traceparent"])
    assert own
    assert "total;dur=" in answer.headers["Server-Timing"]
    # The exporter of this test writes spans to the log.
    until(lambda: f'"span_id": "0x{own[1]}"' in watched.written, "no span")
    assert f'"trace_id": "0x{TRACE}"' in watched.written
    assert "predict cls" in watched.written
    assert SECRET not in watched.written


def test_keys_stay_out_of_the_exporter(watched: Watched) -> None:
    text = requests.get(watched.exporter, timeout=60).text
    assert "ft_up 1.0" in text
    keys = json.loads((watched.folder / "key_file.json").read_text())
    assert not any(own["key"] in text for own in keys.values())


def test_a_restart_is_seen(watched: Watched) -> None:
    assert watched.value("ft_worker_restarts_total") == 0
    os.kill(watched.pid(), signal.SIGKILL)
    until(lambda: watched.value("ft_worker_restarts_total") == 1, watched.written)
