"""Free ports for servers under test."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def free_port(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    for first in range(21080, 31080, 10):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise RuntimeError("no free ports")
