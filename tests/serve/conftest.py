"""A real TorchServe with two tiny models, shared by the tests of this folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from ports import free_port
from serve_command import Command

pytest.importorskip("ts", reason="TorchServe is not installed (pip install 'ft-handler[serve]')")
pytest.importorskip("model_archiver", reason="torch-model-archiver is not installed")

from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.servers.torchserve.archive import archive
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import ServeOptions


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder starts or uses a server."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.serve)


@dataclass
class Running:
    """A started server, and short ways to ask it."""

    server: Server
    output: io.StringIO
    session: requests.Session = field(default_factory=requests.Session)

    def predict(
        self, model: str, body: bytes | str, content_type: str | None = "text/plain", **more: Any
    ) -> requests.Response:
        """POST to /predictions/MODEL."""
        headers = {"Content-Type": content_type} if content_type else {}
        data = body.encode() if isinstance(body, str) else body
        url = f"{self.server.inference}/predictions/{model}"
        return self.session.post(url, data=data, headers=headers, timeout=60, **more)

    def predict_json(self, model: str, document: Any) -> requests.Response:
        """POST a JSON document."""
        return self.predict(model, json.dumps(document), "application/json")

    def manage(self, method: str, path: str, **query: Any) -> requests.Response:
        """Call the management API."""
        url = f"{self.server.management}{path}"
        return self.session.request(method, url, params=query, timeout=120)

    def describe(self, model: str) -> dict[str, Any]:
        """The default version's description."""
        return dict(self.manage("GET", f"/models/{model}").json()[0])

    def pids(self, model: str) -> list[int]:
        """Process ids of the model's READY workers."""
        workers = self.describe(model)["workers"]
        return sorted(w["pid"] for w in workers if w["status"] == "READY")

    def wait_for_pids(self, model: str, count: int, timeout: float = 60) -> list[int]:
        """Wait until `count` workers are READY."""
        deadline = time.monotonic() + timeout
        while len(found := self.pids(model)) != count:
            assert time.monotonic() < deadline, f"{model}: {self.describe(model)['workers']}"
            time.sleep(0.2)
        return found


@pytest.fixture(scope="session")
def traced(
    tiny_classification: Path,
    tiny_qa: Path,
    tiny_tokens: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Path]:
    """Mode -> the folder that tracing the tiny model wrote."""
    sources = {
        "sequence_classification": tiny_classification,
        "question_answering": tiny_qa,
        "token_classification": tiny_tokens,
    }
    folders = {}
    for mode, source in sources.items():
        folders[mode] = tmp_path_factory.mktemp("traced") / mode
        trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=folders[mode]))
    return folders


@pytest.fixture(scope="session")
def store(traced: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with `cls.mar`, `qa.mar` and `tok.mar`."""
    folder = tmp_path_factory.mktemp("store")
    for name, mode in zip(("cls", "qa", "tok"), traced, strict=True):
        archive(traced[mode], model_name=name, export_path=folder)
    return folder


@pytest.fixture(scope="session")
def pack_with_stock_archiver(
    store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., None]:
    """`pack(name, folder, files, config)` runs the stock torch-model-archiver into the store."""

    def pack(name: str, folder: Path, files: Sequence[Path], config: Path | None) -> None:
        handler = subprocess.run(
            [sys.executable, "-m", "ft_handler", "handler-path"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        command = [
            sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name,
            "--version", "1.0", "--handler", handler, "--serialized-file",
            str(folder / "traced_model.pt"), "--extra-files", ",".join(map(str, files)),
            "--export-path", str(store), "--force",
        ]  # fmt: skip
        if config:
            command += ["--config-file", str(config)]
        scratch = tmp_path_factory.mktemp("archiver")  # it deletes $TMPDIR/NAME
        subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(scratch)})

    return pack


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """`start(store, models, **options)` starts a server on free ports, until the session ends."""
    started: list[Server] = []

    def start(store: Path, models: Sequence[str], **options: Any) -> Running:
        port = free_port(5)
        chosen = ServeOptions(
            model_store=store,
            models=tuple(models),
            port=port,
            grpc_port=port + 3,
            **{"token_auth": False, "model_api": True, **options},
        )
        output = io.StringIO()
        server = Server(chosen, cwd=tmp_path_factory.mktemp("cwd"), output=output)
        started.append(server)
        server.start()
        try:
            server.wait_ready(180)
        except Exception:
            print(output.getvalue())
            raise
        return Running(server, output)

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def running(start_server: Callable[..., Running], store: Path) -> Running:
    """The shared server: `cls` loaded at the start, `qa` registered through the management API."""
    running = start_server(store, ["cls.mar"])
    answer = running.manage("POST", "/models", url="qa.mar", initial_workers=1, synchronous="true")
    assert answer.status_code == 200, answer.text
    return running


@pytest.fixture(scope="session")
def expected(tiny_classification: Path) -> Callable[[str], dict[str, float]]:
    """What transformers' own model answers: label -> probability."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    tokenizer = Tokenizer.from_file(str(tiny_classification / "tokenizer.json"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_classification).eval()

    def answer(text: str) -> dict[str, float]:
        encoded = tokenizer.encode(text)
        with torch.inference_mode():
            logits = model(
                torch.tensor([encoded.ids]), token_type_ids=torch.tensor([encoded.type_ids])
            ).logits[0]
        scores = torch.softmax(logits, -1).tolist()
        return {model.config.id2label[i]: score for i, score in enumerate(scores)}

    return answer


@pytest.fixture
def archives_folder(tmp_path: Path, store: Path) -> Path:
    """A store of its own, with a copy of `cls.mar`."""
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(store / "cls.mar", folder)
    return folder


@pytest.fixture
def command() -> Iterator[Callable[..., Command]]:
    """`command(folder, *arguments)` starts one; whatever is left is killed at the end."""
    started: list[Command] = []

    def start(folder: Path, *arguments: str, port: int | None = None) -> Command:
        started.append(Command(folder, *arguments, port=port))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.end()
