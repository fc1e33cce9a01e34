"""A Ray of one machine that Ray Serve runs on, started and stopped for certain."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import requests
import yaml
from ports import free_port

PYTHON = Path(__file__).resolve().parents[2] / "build/servers/ray/bin/python"
#: How often Ray may be started before it counts as broken.
_STARTS = 3
T = TypeVar("T")


def ray_python() -> Path:
    """The interpreter that has Ray; skips where there is none."""
    if not PYTHON.exists():
        pytest.skip("Ray is not installed (scripts/environments.sh)")
    return PYTHON


class Cluster:
    """One Ray with a private folder, and the `serve run` that deploys on it.

    applications  as a config file of Ray Serve has them
    """

    def __init__(self, applications: list[dict[str, Any]], cpus: int = 4) -> None:
        self._bin = ray_python().parent
        # Ray's sockets lie in it, whose paths may not be long.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._applications, self._cpus = applications, cpus
        self._port = free_port(8)
        self.url = f"http://127.0.0.1:{self._port}"
        self._log = self._folder / "log"

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _start(self) -> None:
        ports = [
            f"--{name}={self._port + 1 + at}"
            for at, name in enumerate(
                ("port", "ray-client-server-port", "dashboard-agent-grpc-port",
                 "dashboard-agent-listen-port", "runtime-env-agent-port", "metrics-export-port")
            )
        ]  # fmt: skip
        start = (
            "ray", "start", "--head", "--node-ip-address=127.0.0.1", "--include-dashboard=false",
            "--disable-usage-stats", f"--temp-dir={self._folder}", f"--num-cpus={self._cpus}",
            "--object-store-memory=100000000", *ports,
        )  # fmt: skip
        # Its processes wait some seconds for each other, which a busy machine may not keep.
        for _ in range(_STARTS - 1):
            if self._run(*start) == 0:
                break
            self._end()
        else:
            self._call(*start)
        config = self._folder / "serve.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "http_options": {"host": "127.0.0.1", "port": self._port},
                    "logging_config": {"enable_access_log": False},
                    "applications": self._applications,
                }
            )
        )
        self._call("serve", "run", "--non-blocking", str(config))

    def _call(self, *command: str) -> None:
        assert self._run(*command) == 0, self._log.read_text()[-3000:]

    def _run(self, *command: str) -> int:
        environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"127.0.0.1:{self._port + 1}" if command[0] == "serve" else "",
            "RAY_enable_metrics_collection": "0",
            "RAY_raylet_start_wait_time_s": "40",
        }
        with self._log.open("a") as log:
            done = subprocess.run(
                [self._bin / command[0], *command[1:]],
                env=environment, stdout=log, stderr=log, timeout=240, cwd=self._folder,
            )  # fmt: skip
        return done.returncode

    def wait(self, done: Callable[[], T], seconds: float = 180) -> T:
        """What `done` gives once it is true; requests that fail are not yet."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := done():
                    return found
            except requests.RequestException:
                pass
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.1)

    def wait_ready(self, prefix: str = "") -> None:
        """Wait until an application's models are all ready."""
        url = f"{self.url}{prefix}/v2/health/ready"
        self.wait(lambda: requests.get(url, timeout=10).status_code == 200)

    def replicas(self, name: str) -> dict[int, psutil.Process]:
        """The processes of a deployment, APPLICATION:MODEL, by their pids."""
        return {
            process.pid: process
            for process, title in self._titles().items()
            if title == f"ray::ServeReplica:{name}"
        }

    def _titles(self) -> Mapping[psutil.Process, str]:
        """What the processes below this Ray's own call themselves."""
        found = {}
        for process in self._processes():
            try:
                found[process] = process.cmdline()[0].split()[0]
            except (psutil.Error, IndexError):
                continue
        return found

    def _processes(self) -> set[psutil.Process]:
        """Every process that names this Ray's folder, and all below it."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and str(self._folder) in " ".join(process.cmdline()):
                    found |= {process, *process.children(recursive=True)}
            except psutil.Error:
                continue
        return found

    def stop(self) -> None:
        """End this Ray and no other of the machine, as `ray stop` would."""
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        left = self._processes()
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=20)
