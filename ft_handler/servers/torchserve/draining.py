"""The end of a server that loses nothing: it says so, answers on, and waits until it is idle.

TorchServe cuts every connection when it is told to stop, whatever is in flight on it, and cannot be
told to take no more. So it goes on answering while those that send requests learn that it is not
ready any more, and is stopped when none have come for a moment.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ft_handler.servers.torchserve import busy
from ft_handler.servers.torchserve.api import Api

#: Seconds without a request after which none is on its way between client, Java and worker; what
#: TorchServe waits to fill a batch comes on top.
_QUIET = 0.5
_INTERVAL = 0.1


@contextlib.contextmanager
def announce(port: int) -> Iterator[None]:
    """Have `announced` say meanwhile that the server with this management port drains.

    A name in Linux' abstract namespace needs no folder to write to and is gone with the process.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as said:
        with contextlib.suppress(OSError):
            said.bind(_name(port))
        yield


def announced(port: int) -> bool:
    """Whether the server with this management port, of this machine or container, drains."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(_name(port))
        except OSError:
            return False
    return True


def _name(port: int) -> str:
    return f"\0ft-handler-draining-{port}"


def wait_until_idle(
    api: Api, folder: Path, notice: float, longest: float, alive: Callable[[], bool]
) -> bool:
    """Wait at least `notice` seconds and at most `longest` more; whether nothing is in flight.

    folder  where the workers count their batches
    alive   whether there still is a server to wait for
    """
    start = quiet_since = time.monotonic()
    before: _Still | None = None
    while alive():
        still = _still(api, folder)
        now = time.monotonic()
        if still is None or before is None or still.counts != before.counts:
            quiet_since = now
        elif now - start >= notice and now - quiet_since >= _QUIET + still.delay:
            return True
        if now - start >= notice + longest:
            return False
        before = still
        time.sleep(_INTERVAL)
    return False


@dataclass(frozen=True)
class _Still:
    """Nothing is queued and no worker computes.

    counts  of every worker's batches, by its process
    delay   seconds that TorchServe may keep a request outside the queue to fill a batch
    """

    counts: dict[int, int]
    delay: float


def _still(api: Api, folder: Path) -> _Still | None:
    """What stands still; None while something is in flight, or nobody can tell."""
    counts: dict[int, int] = {}
    delay = 0.0
    try:
        for name in api.registered(timeout=5):
            for version in api.versions(f"{name}/all", timeout=5):
                if version["jobQueueStatus"]["pendingRequests"]:
                    return None
                delay = max(delay, version["maxBatchDelay"] / 1000)
                for worker in version["workers"]:
                    counts[worker["pid"]] = busy.count(folder, worker["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if any(number % 2 for number in counts.values()) else _Still(counts, delay)
