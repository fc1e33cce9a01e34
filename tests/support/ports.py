"""Ports for servers under test, which no other test of this machine takes meanwhile."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO

_STEP = 10
#: Locks of the ports handed out: they last as long as this process, as its servers do.
_held: list[IO[str]] = []


def free_port(count: int) -> int:
    """The first of `count` neighbouring free ports, at most ten, kept for this process.

    A server binds them itself, so they cannot stay bound here; a lock on a file of the machine
    keeps other test runs away from them until this process ends.
    """
    folder = Path(tempfile.gettempdir()) / f"ft-handler-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for first in range(21080, 31080, _STEP):
        lock = (folder / str(first)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return first
    raise RuntimeError("no free ports")
