"""Two instances behind a proxy are restarted in turn under traffic, and nothing is lost.

The proxies are those of deploy/proxy/: HAProxy asks the instances whether they are ready, nginx
does not, and asks the other one when a connection breaks.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from ports import free_port
from serve_command import Command

ROOT = Path(__file__).resolve().parents[2]
PROXIES = ("nginx", "haproxy")
KEY = "Bearer of-this-test"
#: Each text has an answer of its own, so one request's answer is never taken for another's.
TEXTS = [f"film number {number} was {number * 7} times as good" for number in range(40)]


def alike(answer: dict[str, Any], other: Mapping[str, Any]) -> bool:
    """Equal but for what another batch changes in the last digits."""
    return answer["label"] == other["label"] and abs(answer["score"] - other["score"]) < 1e-5


class Traffic:
    """Clients that ask through a proxy until they are told to stop, and check every answer."""

    def __init__(self, url: str, ca: Path, expected: Mapping[str, Any], clients: int) -> None:
        self.wrong: list[str] = []
        self.right = 0
        self._url, self._ca, self._expected = url, str(ca), expected
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(number,)) for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, turn: int) -> None:
        headers = {"Content-Type": "text/plain", "Authorization": KEY}
        with requests.Session() as session:
            session.trust_env = False  # another CA that the environment names
            session.verify = self._ca
            session.headers.update(headers)
            while not self._stop.is_set():
                text = TEXTS[turn % len(TEXTS)]
                turn += 1
                try:
                    answer = session.post(self._url, data=text, timeout=60)
                    good = answer.status_code == 200 and alike(answer.json(), self._expected[text])
                    said = f"{answer.status_code} {answer.text[:200]}"
                except requests.RequestException as error:
                    good, said = False, repr(error)
                time.sleep(0.01)  # the instances that start need the processors as well
                with self._lock:
                    self.right += good
                    if not good:
                        self.wrong.append(f"{text}: {said}")

    def goes_on(self, more: int = 20) -> None:
        """Wait until some more requests are answered."""
        until = self.right + more
        deadline = time.monotonic() + 60
        while self.right < until and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.right >= until, self.wrong[:3]

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of this machine with its key, and the keys of one client, for every proxy."""
    folder = tmp_path / "etc"
    folder.mkdir()
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-keyout", "tls.key", "-out", "tls.crt", "-days", "2", "-subj",
            "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    certificate = (folder / "tls.crt").read_text()
    (folder / "tls.pem").write_text(certificate + (folder / "tls.key").read_text())
    (folder / "keys.map").write_text(f'"{KEY}" "a test";\n')
    (folder / "keys.list").write_text(f"{KEY}\n")
    (folder / "keys.caddy").write_text(f'header Authorization "{KEY}"\n')
    return folder / "tls.crt"


def moved(name: str, folder: Path, ports: Mapping[str, int]) -> Path:
    """A file of deploy/proxy/ with its folders and ports replaced."""
    text = (ROOT / "deploy" / "proxy" / name).read_text()
    text = text.replace("/etc/ft-handler", str(folder / "etc"))
    text = text.replace("/run/ft-handler", str(folder / "run"))
    for old, new in ports.items():
        text, times = re.subn(rf"\b{old}\b", str(new), text)
        assert times or old not in ("8080", "8090", "8443", "9443"), (name, old)
    (folder / "run").mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def proxies(
    tmp_path: Path, certificate: Path
) -> Iterator[Callable[[Sequence[Command]], dict[str, str]]]:
    """`proxies(instances)` starts nginx and HAProxy in front of them: name -> base URL."""
    started: list[subprocess.Popen[bytes]] = []

    def start(instances: Sequence[Command]) -> dict[str, str]:
        front = free_port(2)
        first, second = (instance.port for instance in instances)
        backends = {"8080": first, "8090": second}
        checks = {"8083": first + 5, "8093": second + 5}
        nginx = moved("nginx.conf", tmp_path, {**backends, "8443": front})
        haproxy = moved("haproxy.cfg", tmp_path, {**backends, **checks, "9443": front + 1})
        # What HAProxy shows here is the checks' doing alone.
        haproxy.write_text(re.sub(r"retries 3", "retries 0", haproxy.read_text()))
        for command in (
            ["nginx", "-c", str(nginx), "-e", f"{tmp_path}/run/nginx.log", "-g", "daemon off;"],
            ["haproxy", "-f", str(haproxy), "-db"],
        ):  # fmt: skip
            started.append(subprocess.Popen(command))
        urls = {
            name: f"https://localhost:{front + at}/predictions/cls"
            for at, name in enumerate(PROXIES)
        }
        deadline = time.monotonic() + 30
        for url in urls.values():
            while not answers(url, certificate):
                assert time.monotonic() < deadline, f"no proxy answers at {url}"
                time.sleep(0.2)
        return urls

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


def answers(url: str, ca: Path) -> bool:
    try:
        answer = requests.post(
            url, data=TEXTS[0], verify=str(ca), timeout=10,
            headers={"Authorization": KEY, "Content-Type": "text/plain"},
        )  # fmt: skip
    except requests.RequestException:
        return False
    return answer.status_code == 200


def test_nothing_is_lost_while_instances_restart_in_turn(
    command: Callable[..., Command],
    archives_folder: Path,
    tmp_path: Path,
    certificate: Path,
    proxies: Callable[[Sequence[Command]], dict[str, str]],
) -> None:
    for program in PROXIES:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH (apt-get install {' '.join(PROXIES)})")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()

    def start(folder: Path, port: int | None = None, notice: str = "3") -> Command:
        chosen = free_port(6) if port is None else port
        return command(
            folder, "--model-store", str(archives_folder), "--no-token-auth", "--health-port",
            str(chosen + 5), "--notice", notice, "--drain", "4", port=chosen,
        )  # fmt: skip

    instances = [start(folder) for folder in folders]
    for instance in instances:
        instance.wait_for("Ctrl-C stops the server")
    ask = requests.Session()
    ask.headers["Content-Type"] = "text/plain"
    direct = f"http://127.0.0.1:{instances[0].port}/predictions/cls"
    expected = {text: ask.post(direct, data=text, timeout=60).json() for text in TEXTS}
    assert len({round(answer["score"], 4) for answer in expected.values()}) > len(TEXTS) // 2

    urls = proxies(instances)
    refused = requests.post(urls["nginx"], data="x", verify=str(certificate), timeout=10)
    assert refused.status_code == 401
    inside = requests.get(
        urls["haproxy"].replace("/predictions/cls", "/ping"), verify=str(certificate), timeout=10
    )
    assert inside.status_code == 404
    traffic = {name: Traffic(url, certificate, expected, 2) for name, url in urls.items()}
    try:
        for at, folder in enumerate(folders):
            for flow in traffic.values():
                flow.goes_on()
            instances[at].process.send_signal(signal.SIGTERM)
            # Under nginx' traffic, which goes on until the end, this takes all of the time given.
            assert instances[at].end() == 0
            for flow in traffic.values():
                flow.goes_on()
            instances[at] = start(folder, instances[at].port, notice="600")
            instances[at].wait_for("Ctrl-C stops the server")
    finally:
        for flow in traffic.values():
            flow.end()
    lost = Counter({name: len(flow.wrong) for name, flow in traffic.items()})
    assert not +lost, {name: flow.wrong[:3] for name, flow in traffic.items()}
    assert all(flow.right > 80 for flow in traffic.values())

    # The second signal does not wait for what the first one would.
    for instance in instances:
        instance.process.send_signal(signal.SIGTERM)
    for instance in instances:
        instance.wait_for("draining")
        instance.process.send_signal(signal.SIGTERM)
        assert instance.end() == 0
