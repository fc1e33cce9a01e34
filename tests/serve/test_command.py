"""`ft-handler serve` as a user runs it: start, keys, clean stop, errors in words."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from ports import free_port
from serve_command import Command

SENTENCE = "the film was great"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_with_keys_and_stops_cleanly(
    command: Callable[..., Command], archives_folder: Path, tmp_path: Path, number: int
) -> None:
    (tmp_path / "config.properties").write_text("model_store=store\n")
    server = command(tmp_path)
    server.wait_for("Ctrl-C stops the server")
    url = f"http://127.0.0.1:{server.port}/predictions/cls"
    assert requests.post(url, data=SENTENCE, timeout=30).status_code in (400, 401)
    key_file = tmp_path / "key_file.json"
    assert key_file.stat().st_mode & 0o077 == 0
    key = yaml.safe_load(key_file.read_text())["inference"]["key"]
    assert not any(key in line for line in server.lines)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "text/plain"}
    answer = requests.post(url, data=SENTENCE, headers=headers, timeout=30)
    assert answer.status_code == 200
    # Registering is off unless asked for.
    listed = requests.post(
        f"http://127.0.0.1:{server.port + 1}/models?url=cls.mar", headers=headers, timeout=30
    )
    assert listed.status_code >= 400
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2  # Java and a worker
    server.process.send_signal(number)
    assert server.end() == 0, "".join(server.lines)
    _, alive = psutil.wait_procs(family, 5)
    assert not alive, alive
    assert not key_file.exists()


def test_server_does_not_outlive_a_killed_command(
    command: Callable[..., Command], archives_folder: Path, tmp_path: Path
) -> None:
    server = command(tmp_path, "--model-store", "store", "--no-token-auth")
    server.wait_for("Ctrl-C stops the server")
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.end()
    _, alive = psutil.wait_procs(family, 20)
    assert not alive, alive


def test_bad_setting_ends_the_start_and_is_named(
    command: Callable[..., Command], archives_folder: Path, tmp_path: Path
) -> None:
    """An archive from elsewhere: its settings are read only when a worker loads it."""
    with zipfile.ZipFile(archives_folder / "cls.mar") as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    settings = yaml.safe_load(files["model-config.yaml"])
    settings["handler"]["max_lenght"] = 64
    files["model-config.yaml"] = yaml.safe_dump(settings).encode()
    with zipfile.ZipFile(archives_folder / "cls.mar", "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    server = command(tmp_path, "--model-store", "store", "--no-token-auth")
    assert server.end() == 1
    last = server.lines[-1]
    assert last.startswith("error: ")
    assert "max_lenght" in last


def test_taken_port_is_named(
    command: Callable[..., Command], archives_folder: Path, tmp_path: Path
) -> None:
    import socket

    server_port = free_port(5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server_port))
        taken.listen()
        done = subprocess.run(
            [
                sys.executable, "-m", "ft_handler", "serve", "--model-store", "store",
                "--port", str(server_port),
            ],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ},
        )  # fmt: skip
    assert done.returncode == 1
    assert re.search(rf"error: 127\.0\.0\.1:{server_port} .*--port", done.stderr)
    assert "Traceback" not in done.stderr
