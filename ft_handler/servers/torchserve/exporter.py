"""A Prometheus endpoint of what TorchServe knows but does not export: queues and workers.

TorchServe's own metrics count what went through a queue, and a worker sees only the batch it was
handed, so neither says how much waits now. The management API does. It is asked whenever Prometheus
asks, so nothing is older than the scrape.
"""

from __future__ import annotations

import threading
import urllib.error
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ft_handler.errors import EnvironmentProblem
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import address, port_number

_TIMEOUT = 5.0
_LABELS = ("ModelName", "ModelVersion")

UP = "ft_up"
RESTARTS = "ft_worker_restarts_total"
#: Name -> meaning. All but `UP` are told of each version of each model.
GAUGES = {
    UP: "1 when TorchServe's management API answered.",
    "ft_queue_depth": "Requests that wait for a worker, now.",
    "ft_queue_capacity": "Requests that may wait; more answer 503.",
    "ft_workers": "Workers that TorchServe keeps.",
    "ft_workers_ready": "Workers that are READY.",
}
COUNTERS = {
    RESTARTS: "How often a worker was found to have another process than before.",
}

#: A version of a model, as the management API describes it.
Description = Mapping[str, Any]


class Collector:
    """What the management API says, as metric families of prometheus_client.

    ask  calls the management API: a path to what it answers
    """

    def __init__(self, ask: Callable[[str], Any]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._pids: dict[tuple[str, str, str], int] = {}
        self._restarts: dict[tuple[str, str], int] = {}

    def describe(self) -> Sequence[Any]:
        """No names before the first scrape, so that registering asks nothing."""
        return ()

    def collect(self) -> Iterator[Any]:
        """One family a metric; of a server that does not answer `ft_up` alone."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        versions: list[Description] | None
        try:
            versions = self._versions()
        except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError):
            versions = None
        yield GaugeMetricFamily(UP, GAUGES[UP], value=float(versions is not None))
        if versions is None:
            return
        values = {(v["modelName"], v["modelVersion"]): _values(v) for v in versions}
        for name, meaning in GAUGES.items():
            if name == UP:
                continue
            family = GaugeMetricFamily(name, meaning, labels=_LABELS)
            for labels, own in values.items():
                family.add_metric(labels, own[name])
            yield family
        restarts = CounterMetricFamily(RESTARTS, COUNTERS[RESTARTS], labels=_LABELS)
        for labels, count in self._count(versions).items():
            restarts.add_metric(labels, count)
        yield restarts

    def _versions(self) -> list[Description]:
        """Every version of every model."""
        models = self._ask("/models?limit=1000")["models"]
        found: list[Description] = []
        for model in models:
            try:
                found += self._ask(f"/models/{model['modelName']}/all")
            except urllib.error.HTTPError as error:
                if error.code != 404:  # unregistered meanwhile
                    raise
        return found

    def _count(self, versions: Sequence[Description]) -> dict[tuple[str, str], int]:
        """Restarts of each version's workers that were seen until now."""
        with self._lock:
            seen: dict[tuple[str, str, str], int] = {}
            counts: dict[tuple[str, str], int] = {}
            for version in versions:
                labels = version["modelName"], version["modelVersion"]
                counts[labels] = self._restarts.get(labels, 0)
                for worker in version.get("workers", ()):
                    key = (*labels, worker["id"])
                    pid = worker["pid"]
                    before = self._pids.get(key, pid)
                    if pid < 0:  # none yet
                        pid = before
                    elif before >= 0:
                        counts[labels] += pid != before
                    seen[key] = pid
            self._pids, self._restarts = seen, counts
            return counts


def _values(version: Description) -> dict[str, float]:
    queue, workers = version["jobQueueStatus"], version.get("workers", ())
    waiting = queue["pendingRequests"]
    return {
        "ft_queue_depth": waiting,
        "ft_queue_capacity": waiting + queue["remainingCapacity"],
        "ft_workers": len(workers),
        "ft_workers_ready": sum(worker["status"] == "READY" for worker in workers),
    }


class Exporter:
    """Serves a `Collector` at http://HOST:PORT/metrics between `start` and `stop`."""

    def __init__(self, collector: Collector, host: str, port: int) -> None:
        self.address = f"http://{host}:{port}"
        self._collector, self._host, self._port = collector, host, port
        self._running: tuple[Any, threading.Thread] | None = None

    @classmethod
    def of(cls, server: Server, port: int) -> Exporter:
        """The exporter of a server, on the host of its metrics; raises ConfigError."""

        def ask(path: str) -> Any:
            answer = server.request(server.management + path, timeout=_TIMEOUT)
            if isinstance(answer, str):
                raise ValueError("the management API answered no JSON")
            return answer

        # Behind a Unix socket nothing is offered to others, and neither is this.
        host = address("metrics_address", server.metrics).host or "127.0.0.1"
        return cls(Collector(ask), host, port_number("--exporter-port", str(port)))

    def start(self) -> None:
        """Serve; raises EnvironmentProblem where a package is missing or the port is taken."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise EnvironmentProblem(
                "the exporter needs prometheus_client; pip install 'ft-handler[exporter]'"
            ) from None
        registry = CollectorRegistry()
        registry.register(self._collector)
        try:
            self._running = start_http_server(self._port, self._host, registry)
        except OSError as error:
            raise EnvironmentProblem(
                f"{self._host}:{self._port} (--exporter-port) cannot be bound: {error.strerror}; "
                "stop what uses it, or choose another"
            ) from None

    def stop(self) -> None:
        """Serve no longer; may be called twice."""
        running, self._running = self._running, None
        if running is not None:
            server, thread = running
            server.shutdown()
            server.server_close()
            thread.join()
