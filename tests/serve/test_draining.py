"""A server with keys: `ft-handler ready` asks it, and SIGTERM loses nothing that is in flight."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import requests
from serve_command import Command


def ready(folder: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ft_handler", "ready", "--port", str(port), *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_ready_with_keys_and_all_answers_after_sigterm(
    command: Callable[..., Command], archives_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.properties").write_text("model_store=store\n")
    server = command(tmp_path, "--drain", "60")
    server.wait_for("Ctrl-C stops the server")

    for names in ((), ("cls",), ("cls/1.0", "cls")):
        done = ready(tmp_path, server.port, "--timeout", "60", *names)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = ready(tmp_path, server.port, "other")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: other: no such model is registered\n"
    done = ready(tmp_path, server.port, "--key-file", "none")
    assert done.returncode == 1
    assert "management API answers 400" in done.stderr

    key = json.loads((tmp_path / "key_file.json").read_text())["inference"]["key"]
    url = f"http://127.0.0.1:{server.port}/predictions/cls"
    texts = [f"the film was great, number {number} " * 10 for number in range(64)]
    statuses: list[int | str] = []

    def ask() -> None:
        try:
            answer = requests.post(
                url, json=texts, headers={"Authorization": f"Bearer {key}"}, timeout=120
            )
            statuses.append(answer.status_code if len(answer.json()) == len(texts) else "short")
        except requests.RequestException as error:
            statuses.append(repr(error))

    clients = [threading.Thread(target=ask) for _ in range(12)]
    for client in clients:
        client.start()
    # Once one is answered, the others have been taken: queued, or in the worker.
    while not statuses:
        clients[0].join(0.01)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    during = ready(tmp_path, server.port)
    for client in clients:
        client.join()
    assert statuses == [200] * 12
    assert server.end() == 0
    assert during.returncode == 1
