"""Keeps N connections busy with POST requests and counts answers; standard library only.

    python benchmarks/load.py URL BODIES CONTENT_TYPE CONNECTIONS SECONDS

BODIES holds one request body a line. Prints one JSON object. Several processes share the
connections, since one Python process cannot keep a fast server busy.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit


class Connection(asyncio.Protocol):
    """One keep-alive connection: a request goes out as soon as the last answer is in."""

    def __init__(self, requests: list[bytes], first: int, until: float) -> None:
        self.requests, self.next, self.until = requests, first, until
        self.latencies: array.array[float] = array.array("d")
        self.errors = 0
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.transport.write(self.requests[self.next % len(self.requests)])
        self.next += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(body) < length:
            return
        now = time.perf_counter()
        if head.split(b" ", 2)[1] == b"200":
            self.latencies.append(now - self._sent)
        else:
            self.errors += 1
        self._buffer = b""
        if now >= self.until:
            self.transport.close()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self.errors += error is not None
        if not self.finished.done():
            self.finished.set_result(None)


async def drive(
    url: str, bodies: list[bytes], kind: str, count: int, seconds: float, first: int
) -> tuple[array.array[float], int]:
    """Latencies in seconds and the number of failures of `count` connections."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {kind}\r\n"
    requests = [f"{head}Content-Length: {len(b)}\r\n\r\n".encode() + b for b in bodies]
    loop, until = asyncio.get_running_loop(), time.perf_counter() + seconds
    made = [
        await loop.create_connection(
            lambda i=i: Connection(requests, first + i * 131, until), parts.hostname, parts.port
        )
        for i in range(count)
    ]
    await asyncio.gather(*(protocol.finished for _, protocol in made))
    everything: array.array[float] = array.array("d")
    for _, protocol in made:
        everything.extend(protocol.latencies)
    return everything, sum(protocol.errors for _, protocol in made)


def child(arguments: list[str]) -> None:
    """Latencies as raw doubles on stdout, the error count on stderr."""
    url, bodies, kind, count, seconds, first = arguments
    lines = Path(bodies).read_bytes().splitlines()
    latencies, errors = asyncio.run(drive(url, lines, kind, int(count), float(seconds), int(first)))
    sys.stdout.buffer.write(latencies.tobytes())
    sys.stderr.write(str(errors))


def load(url: str, bodies: Path, kind: str, connections: int, seconds: float) -> dict[str, float]:
    """Requests a second, p50 and p99 in milliseconds, and errors."""
    count = min(connections, max(1, len(os.sched_getaffinity(0)) // 4), 8)
    shares = [connections // count + (i < connections % count) for i in range(count)]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", url, str(bodies), kind, str(share),
             str(seconds), str(i * 7919)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i, share in enumerate(shares)
    ]  # fmt: skip
    latencies: array.array[float] = array.array("d")
    errors = 0
    for process in children:
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the load generator failed: {err.decode()[-500:]}")
        latencies.frombytes(out)
        errors += int(err or 0)
    ordered = sorted(latencies)
    if not ordered:
        return {
            "requests": 0,
            "requests_per_s": 0.0,
            "p50_ms": 0.0,
            "p99_ms": 0.0,
            "errors": errors,
        }
    return {
        "requests": len(ordered),
        "requests_per_s": len(ordered) / seconds,
        "p50_ms": ordered[len(ordered) // 2] * 1e3,
        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
        "errors": errors,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        url, bodies, kind, connections, seconds = sys.argv[1:]
        print(json.dumps(load(url, Path(bodies), kind, int(connections), float(seconds))))
