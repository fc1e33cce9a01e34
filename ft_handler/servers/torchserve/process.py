"""Runs TorchServe in the foreground: finds Java, waits for the workers, leaves nothing behind.

Java is started directly with the command line that `torchserve --start` would build, so that one
process owns the server and its end can be waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from ft_handler.errors import EnvironmentProblem
from ft_handler.servers.torchserve import busy, propertyfile
from ft_handler.servers.torchserve.api import KEY_FILE, Api
from ft_handler.servers.torchserve.draining import announce, wait_until_idle
from ft_handler.servers.torchserve.java import find_java, java_options
from ft_handler.servers.torchserve.properties import (
    ADDRESSES,
    GRPC_PORTS,
    LOG_CONFIG,
    ServeOptions,
    address,
    effective_properties,
    port_number,
    wanted_models,
)
from ft_handler.servers.torchserve.settings import RESPONSE_SIZE, RESPONSE_VARIABLE

#: Lines every start prints on a machine without a GPU or on a newer Java; they mean nothing.
NOISE = ("WARNING: sun.reflect.Reflection.getCallerClass", "nvidia-smi not available")


def running(options: ServeOptions, key_file: Path) -> Api:
    """A server that was started with these options; keys are sent where there are some."""
    properties = effective_properties(options, os.environ)
    return Api({**properties, "disable_token_authorization": "false"}, key_file)


def _die_with_parent() -> None:
    """Linux: have the kernel end this child when its parent is killed outright."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server(Api):
    """One TorchServe, started on `start()` (or `with`) and gone with all its workers on `stop()`.

    `cwd` is where TorchServe writes key_file.json when token authorization is on; everything else
    it writes goes to a temporary folder of its own.
    """

    def __init__(
        self,
        options: ServeOptions,
        *,
        cwd: Path | None = None,
        output: IO[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = dict(os.environ if environment is None else environment)
        self.cwd = (cwd or Path.cwd()).resolve()
        super().__init__(effective_properties(options, self._environment), self.cwd / KEY_FILE)
        self.models = wanted_models(options, self.properties)
        # What the user wrote is checked before the machine is.
        self.java = find_java()
        self._output = output or sys.stdout
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._scratch: Path | None = None
        self._started = 0.0
        self._deaths = 0
        self._cause = ""

    @property
    def pid(self) -> int:
        """Process id of the Java server, also the id of its process group."""
        return self._running().pid

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    # life

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def command(self, config: Path) -> list[str]:
        """The Java command line."""
        spec = importlib.util.find_spec("ts")
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentProblem(
                "TorchServe is not installed; pip install 'ft-handler[serve]' (or torchserve)"
            )
        home = Path(next(iter(spec.submodule_search_locations))).resolve()
        vmargs = self.properties.get("vmargs", "").split()
        if not any(a.startswith("-Dlog4j.configurationFile=") for a in vmargs):
            vmargs.append(f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}")
        command = [
            str(self.java.path), f"-Dmodel_server_home={home.parent}",
            f"-Djava.io.tmpdir={self._scratch}", *java_options(self.java.version), *vmargs,
            "-cp", f".:{home / 'frontend' / '*'}", "org.pytorch.serve.ModelServer",
            "--python", sys.executable, "-f", str(config), "-s", self.properties["model_store"],
            "-ncs",
        ]  # fmt: skip
        # The switches count on the command line as well as in the file.
        if not self.token_auth:
            command.append("--disable-token-auth")
        if self.properties.get("enable_model_api", "false").lower() == "true":
            command.append("--enable-model-api")
        if self.models:
            command += ["-m", *self.models.values()]
        return command

    def start(self) -> None:
        """Start Java; returns at once. Raises EnvironmentProblem when a port is taken."""
        self._check_ports()
        self._scratch = Path(tempfile.mkdtemp(prefix="ft_handler_"))
        (self._scratch / busy.FOLDER).mkdir()
        config = self._scratch / "config.properties"
        config.write_text(propertyfile.dump(self.properties), encoding="ascii")
        environment = self._environment
        # Its pid file, sockets and extracted archives stay apart from any other instance's.
        environment["TMPDIR"] = str(self._scratch)
        environment.setdefault("LOG_LOCATION", str(self._scratch / "logs"))
        environment.setdefault("METRICS_LOCATION", str(self._scratch / "logs"))
        environment[RESPONSE_VARIABLE] = self.properties.get(
            "max_response_size", str(RESPONSE_SIZE)
        )
        if self.token_auth:
            self.key_file.unlink(missing_ok=True)  # never mistake an older server's keys for ours
        self._started = time.monotonic()
        try:
            self._process = subprocess.Popen(
                self.command(config),
                cwd=self.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except BaseException:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        self._reader = threading.Thread(
            target=self._forward, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()

    def _check_ports(self) -> None:
        for key in ADDRESSES:
            found = address(key, self.properties[key])
            if found.path:
                self._check_socket(key, Path(found.path))
            else:
                self._check_port(key, found.host, found.port)
        for key in GRPC_PORTS:
            host_key = key.replace("_port", "_address")
            # Java takes an IPv6 address with and without its brackets.
            host = self.properties.get(host_key, "127.0.0.1").strip("[]")
            self._check_port(key, host, port_number(key, self.properties[key]))

    @staticmethod
    def _check_socket(key: str, path: Path) -> None:
        """A socket that another server listens on is not ours; one left behind is taken over."""
        if not path.parent.is_dir():
            raise EnvironmentProblem(f"{key} is {path}, but there is no folder {path.parent}")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                return
        raise EnvironmentProblem(
            f"{path} ({key}) cannot be bound: another server listens there; stop it, or choose "
            "another path"
        )

    @staticmethod
    def _check_port(key: str, host: str, port: int) -> None:
        problem = None
        try:
            # Java binds the first address that a name stands for.
            family, kind, protocol, _, where = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
        except OSError as error:  # gaierror, of names, among them
            problem = error.strerror
        if problem:
            shown = f"[{host}]" if ":" in host else host
            raise EnvironmentProblem(
                f"{shown}:{port} ({key}) cannot be bound: {problem}; stop what uses it, "
                "or choose others with --port and --grpc-port"
            )

    def _forward(self, lines: Iterable[str]) -> None:
        """Pass the server's output on, and remember why a worker died."""
        for line in lines:
            message = line.rstrip("\n").partition(" MODEL_LOG - ")[2]
            if re.match(r"[\w.]*(Error|Exception|Problem|Exit)\b", message):
                self._cause = message.strip()
            if "Backend worker process died" in message:
                self._deaths += 1
            if line.startswith(NOISE):
                continue
            with contextlib.suppress(ValueError, OSError):  # the output may be closed before us
                self._output.write(line)
                self._output.flush()

    @property
    def alive(self) -> bool:
        """Whether the Java server runs."""
        return self._process is not None and self._process.poll() is None

    def drain(self, notice: float, longest: float) -> bool:
        """Answer on until nothing is in flight; whether that came to be.

        notice   seconds for which requests are expected all the same, since whoever sends them has
                 yet to learn that `ready` fails now
        longest  seconds after those until the wait is given up
        """
        assert self._scratch is not None  # there is nothing to drain before the start
        with announce(self.port_of("management_address")):
            return wait_until_idle(
                self, self._scratch / busy.FOLDER, notice, longest, lambda: self.alive
            )

    def stop(self) -> None:
        """End the server and every worker; may be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Java ends its workers; whatever it left behind shares its process group.
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + 3
            while _group_alive(process.pid) and time.monotonic() < deadline:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
                time.sleep(0.05)
        if self._reader is not None:
            self._reader.join(5)
        if process.stdout is not None:
            process.stdout.close()
        if self.token_auth:
            self.key_file.unlink(missing_ok=True)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def wait(self) -> int:
        """Block until the server ends by itself; its exit code."""
        return self._running().wait()

    def wait_ready(
        self,
        timeout: float = 300,
        on_progress: Callable[[Sequence[str], Sequence[str]], None] | None = None,
    ) -> float:
        """Wait until every loaded model's workers are READY; seconds since the start.

        Raises EnvironmentProblem when the server ends, when workers die while they load, or after
        `timeout` seconds. `on_progress(ready, waiting)` is called while waiting.
        """
        process = self._running()
        while True:
            if process.poll() is not None:
                raise EnvironmentProblem(
                    f"TorchServe ended with code {process.returncode} before it was ready; "
                    "its messages are above"
                )
            if self._deaths >= 2:
                raise EnvironmentProblem(
                    "a worker died twice while loading: " + (self._cause or "see the log above")
                )
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                done, waiting = self.ready()
                missing = set(self.models) - {*done, *waiting}
                if missing:
                    raise EnvironmentProblem(
                        "TorchServe did not register " + ", ".join(sorted(missing)) + "; its "
                        "messages are above"
                    )
                if on_progress:
                    on_progress(done, waiting)
                if not waiting:
                    return time.monotonic() - self._started
            if time.monotonic() - self._started > timeout:
                raise EnvironmentProblem(f"the workers are not ready after {timeout:.0f} s")
            time.sleep(0.2)


def _group_alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
