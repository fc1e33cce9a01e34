"""KServe's own server in front of a tiny model, asked by KServe's and Triton's clients."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from malformed import CASES
from ports import free_port

from ft_handler.config import RawSettings, model_yaml
from ft_handler.runtime import open_model
from ft_handler.servers import server_settings
from ft_handler.types import Incoming, Reply

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build" / "servers" / "kserve" / "bin" / "python"
TEXTS = ("the film was great", "a bad plot", "caf\u00e9 in the old harbour")
#: A client's text that nothing may repeat.
SECRET = "zanzibar"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="KServe is not installed (scripts/environments.sh)"
)


@dataclass
class Served:
    """A running server: its HTTP port, the gRPC one behind it, its log, its process."""

    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.port + 1}"

    def post(self, path: str, body: bytes, content_type: str | None, **headers: str) -> Any:
        kind = {} if content_type is None else {"Content-Type": content_type}
        return requests.post(self.base + path, body, headers={**kind, **headers}, timeout=60)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def served(
    traced: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    port = free_port(2)
    log = tmp_path_factory.mktemp("kserve") / "log"
    command = [
        PYTHON, "-m", "ft_handler.servers.kserve", "--model_name=cls",
        f"--model_dir={traced['sequence_classification']}",
        f"--http_port={port}", f"--grpc_port={port + 1}",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment())
    served = Served(port, log, process)
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if requests.get(served.base + "/v2/health/ready", timeout=10).ok:
                break
        except requests.ConnectionError:
            time.sleep(0.2)
    yield served
    if process.poll() is None:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def replies(traced: Mapping[str, Path]) -> Any:
    """`replies(*requests)`: what the core answers, as TorchServe's worker does."""
    folder = traced["sequence_classification"]
    raw = RawSettings.of_model_dir(folder, model_yaml(folder))
    pipeline = open_model(folder, raw, groups=server_settings(), name="cls").pipeline

    def answer(*incoming: Incoming) -> list[Reply]:
        return pipeline.run(incoming)[0]

    return answer


def asked(python: Path, script: str, *arguments: str) -> dict[str, Any]:
    """What a client's script printed."""
    if not python.exists():
        pytest.skip(f"{python.parts[-3]} is not installed (scripts/environments.sh)")
    command = [python, ROOT / "tests" / "clients" / script, *arguments, *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def rows(replies: Any) -> list[dict[str, Any]]:
    """The answers to TEXTS."""
    (reply,) = replies(Incoming(list(TEXTS)))
    return list(json.loads(reply.body))


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The answers as tensors; scores are fp32 in them."""
    return {
        "label": [row["label"] for row in rows],
        "score": [pytest.approx(row["score"], rel=1e-6) for row in rows],
    }


def test_kserves_clients(served: Served, replies: Any, rows: list[dict[str, Any]]) -> None:
    found = asked(PYTHON, "kserve_server_client.py", served.base, served.grpc, "cls")
    assert found["v1"] == rows
    for name in ("v2 False", "v2 True", "grpc False", "grpc True"):
        assert found[name] == as_columns(rows), name
    (best,) = replies(Incoming({"text": TEXTS[0], "top_k": 2}))
    assert found["top_k"] == as_columns(json.loads(best.body))
    assert found["ready"] == [True] * 4
    assert found["among bad ones"] == [as_columns([row]) for row in rows * 8]
    words = {
        "empty": "is empty",
        "not UTF-8": "UTF-8",
        "broken": "raw_input_contents",
        "shape": "shape",
        "type": "BYTES",
        "nothing": "empty",
        "parameter": "unheard_of",
        "two": "same name",
        "too many": "the limit is 2048",
    }
    refused = found["refused"]
    assert refused.pop("model")[0] == "NOT_FOUND"
    for name, (code, message) in refused.items():
        assert code == "INVALID_ARGUMENT", name
        assert words[name] in message, name
    assert refused.keys() == words.keys()


def test_tritons_clients(served: Served, rows: list[dict[str, Any]]) -> None:
    python = ROOT / "build" / "clients" / "tritonclient" / "bin" / "python"
    http = served.base.removeprefix("http://")
    found = asked(python, "tritonclient_kserve.py", http, served.grpc, "cls")
    wanted = list(as_columns(rows).values())
    for name in ("http {'binary_data': False}", "http {'binary_data': True}", "grpc {}"):
        assert found.pop(name) == wanted
    message = "data[0]: 'text' is empty"
    assert found == {
        "http inputs": ["text"],
        "grpc inputs": ["text"],
        "http refused": ["422", message],
        "grpc refused": ["StatusCode.INVALID_ARGUMENT", message],
    }


def near(document: Any) -> Any:
    """The document, its scores as far as they do not depend on what shares a batch."""
    if isinstance(document, float):
        return pytest.approx(document, rel=1e-5)
    if isinstance(document, dict):
        return {key: near(value) for key, value in document.items()}
    return [near(value) for value in document] if isinstance(document, list) else document


def test_bodies_are_answered_as_torchserves_are(served: Served, replies: Any) -> None:
    """Good and bad ones together, each as the core answers it alone."""
    tensors = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [SECRET]}]}
    sent: list[tuple[str | None, bytes]] = [
        *((case.content_type, case.body) for case in CASES["sequence_classification"]),
        *(
            (kind, json.dumps(document).encode())
            for kind in ("application/json", "application/json; charset=utf-8", None)
            for document in (
                {"instances": list(TEXTS)},
                {**tensors, "id": "7", "parameters": {"top_k": 3}},
                {"text": SECRET, "text_pair": "a film"},
                {"instances": [f"{SECRET} {n}" for n in range(40)]},
                {"instances": [SECRET, ""]},
                {**tensors, "unknown key": 1},
            )
        ),
        ("text/plain", SECRET.encode()),
    ] * 2
    wanted = [replies(Incoming(body, content_type=kind))[0] for kind, body in sent]
    paths = ("/v1/models/cls:predict", "/v2/models/cls/infer")
    with ThreadPoolExecutor(16) as pool:
        calls = [
            pool.submit(served.post, paths[n % 2], body, kind)
            for n, (kind, body) in enumerate(sent)
        ]
    for call, reply, (_, body) in zip(calls, wanted, sent, strict=True):
        answer = call.result()
        wanted_body = near(json.loads(reply.body))
        assert (answer.status_code, answer.json()) == (reply.status, wanted_body), body[:80]
        assert answer.headers["content-type"] == "application/json"
    figures = dict(
        re.findall(
            r'^(ft_\w+)\{model_name="cls"\} (\S+)$',
            requests.get(served.base + "/metrics", timeout=30).text,
            re.M,
        )
    )
    assert float(figures["ft_refused_total"]) >= sum(400 <= r.status < 500 for r in wanted)
    assert float(figures["ft_failed_total"]) == 0
    # What came at once was computed together.
    assert float(figures["ft_batch_requests_count"]) < float(figures["ft_requests_total"])
    assert float(figures["ft_queue_requests"]) == 0


def test_what_rest_alone_refuses(served: Served) -> None:
    large = served.post("/v1/models/cls:predict", b" " * (8 * 1024 * 1024 + 1), "text/plain")
    assert (large.status_code, large.json()["type"]) == (413, "RequestTooLarge")
    zipped = served.post("/v2/models/cls/infer", b"{}", None, **{"Content-Encoding": "gzip"})
    assert (zipped.status_code, zipped.json()["type"]) == (415, "UnsupportedMedia")
    for size, status in (("9", 400), ("nine", 400)):
        headers = {"Inference-Header-Content-Length": size}
        cut = served.post(
            "/v2/models/cls/infer", b'{"inputs', "application/octet-stream", **headers
        )
        assert cut.status_code == status
    assert served.post("/v1/models/nobody:predict", b"{}", None).status_code == 404
    explained = served.post("/v1/models/cls:explain", b'{"instances": ["a"]}', None)
    assert (explained.status_code, explained.json()["type"]) == (501, "NotOffered")
    for verb in ("load", "unload"):
        assert served.post(f"/v2/repository/models/cls/{verb}", b"", None).status_code == 501
    assert requests.get(served.base + "/v2/models/cls/ready", timeout=30).ok


def test_the_model_says_its_tensors(served: Served) -> None:
    told = requests.get(served.base + "/v2/models/cls", timeout=30).json()
    assert told["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert told["outputs"] == [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "score", "datatype": "FP32", "shape": [-1]},
    ]


def test_the_pages_commands(traced: Mapping[str, Path], tmp_path: Path) -> None:
    """docs/kserve.md from its first command to its last, on other ports."""
    text = (ROOT / "docs" / "kserve.md").read_text()
    lines = ["set -euo pipefail"]
    for language, block in re.findall(r"^```(bash|python) run\n(.*?)^```$", text, re.M | re.S):
        lines.append(block if language == "bash" else f"python - <<'END'\n{block}END\n")
    port = free_port(2)
    program = "\n".join(lines).replace("8081", str(port + 1)).replace("8080", str(port))
    program = program.replace(
        "sentiment &", f"sentiment --http_port={port} --grpc_port={port + 1} &"
    )
    (tmp_path / "build" / "example").mkdir(parents=True)
    (tmp_path / "build" / "example" / "sentiment").symlink_to(traced["sequence_classification"])
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    log = tmp_path / "log"
    with log.open("w") as output:
        shell = subprocess.Popen(
            ["bash", "-c", program], cwd=tmp_path, env={**environment(), "PATH": path},
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait(180)
        finally:
            with contextlib.suppress(ProcessLookupError):  # unless its server is left
                os.killpg(shell.pid, signal.SIGKILL)
    said = log.read_text()
    assert code == 0, said
    for part in ('{"predictions":[{"label":', '"id":"42"', '"name":"sentiment"', "('label', "):
        assert part in said


def test_what_cannot_be_served_is_said_in_a_line(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from ft_handler.servers.kserve.__main__ import main\n"
        "for more in (['--workers=2'], []):\n"
        "    sys.argv = ['serve', '--model_dir=nowhere', *more]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        print(end)\n"
    )
    done = subprocess.run(
        [PYTHON, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first.startswith("error: --workers must be 1")
    assert second == "error: --model_dir: there is no nowhere"


@pytest.mark.skipif(importlib.util.find_spec("kserve") is not None, reason="KServe is here")
def test_without_kserve_the_extra_is_named() -> None:
    command = [sys.executable, "-m", "ft_handler.servers.kserve", "--model_dir=nowhere"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: KServe is missing: pip install 'ft-handler[kserve]'\n"


def test_a_process_without_its_device_ends_and_a_model_that_fails_is_not_ready() -> None:
    """A model whose pipeline is a fake, in KServe's environment."""
    script = ROOT / "tests" / "clients" / "kserve_failing_model.py"
    done = subprocess.run(
        [PYTHON, script], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.stdout.splitlines() == ["answers: False", "INTERNAL internal error", "503"]
    assert "the device is lost, this process ends: it fell off the bus" in done.stderr
    assert done.returncode == 1


def test_what_cannot_be_done_in_time_is_bounded(served: Served) -> None:
    """By half of `responseTimeout`, as TorchServe's and Ray Serve's workers have it."""
    assert re.search(r"tokens at most: \d+ of a request, \d+ of what", served.log.read_text())


def test_what_is_under_way_is_answered_before_the_end(served: Served, rows: Any) -> None:
    """The last test: SIGTERM under load."""
    body = json.dumps({"instances": list(TEXTS) * 40}).encode()
    with ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(served.post, "/v1/models/cls:predict", body, "application/json")
            for _ in range(8)
        ]
        while "ft_requests" not in requests.get(served.base + "/metrics", timeout=30).text:
            time.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        answered = 0
        for call in calls:
            try:
                answer = call.result()
            except requests.ConnectionError:
                continue  # it came after the end
            assert answer.json() == {"predictions": rows * 40}
            answered += 1
    assert served.process.wait(60) == 0
    assert SECRET not in served.log.read_text()
