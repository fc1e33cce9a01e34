"""`ft-handler serve` as a process under test."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from ports import free_port


class Command:
    """A running `ft-handler serve`; its output is read all along.

    port  first of six: inference, management, metrics, two of gRPC, and one for health
    """

    def __init__(self, folder: Path, *arguments: str, port: int | None = None) -> None:
        self.port = free_port(6) if port is None else port
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "ft_handler", "serve", "--port", str(self.port),
                "--grpc-port", str(self.port + 3), *arguments,
            ],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, text: str, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not any(text in line for line in self.lines):
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.1)

    def end(self) -> int:
        code = self.process.wait(120)
        self.reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code
