"""Ports of tests are handed out once."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from ports import free_port


def test_ports_that_are_handed_out_are_nobody_elses() -> None:
    """Neither this process nor another gets them again, though nothing listens there yet."""
    first, second = free_port(5), free_port(5)
    assert abs(first - second) >= 5
    for port in range(first, first + 5):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
    support = Path(__file__).resolve().parents[1] / "support"
    code = (
        f"import sys; sys.path.insert(0, {str(support)!r}); import ports; print(ports.free_port(5))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) not in (first, second)
