"""Clients that send slowly, too much or nothing, beside good ones that go on being answered.

All on loopback, and bounded: so many connections, so many requests.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Running

SLOW = 200
FLOOD = 300
GOOD = 60
SENTENCE = "the film was great"
HEAD = "POST /predictions/cls HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\n"


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Running], store: Path) -> Running:
    """A server of its own: what it is left with is looked at."""
    return start_server(store, ["cls.mar"], overrides={"max_request_size": "20000"})


@pytest.fixture
def connect(server: Running) -> Iterator[Callable[[], socket.socket]]:
    """`connect()` opens a connection, until the test ends."""
    address = urllib.parse.urlsplit(server.server.inference)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            socket.create_connection((address.hostname, address.port), timeout=30)
        )


def handles(running: Running) -> int:
    return len(os.listdir(f"/proc/{running.server.pid}/fd"))


def good_requests(running: Running, answer: Any) -> None:
    """Many at once: each gets its answer."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: running.predict("cls", SENTENCE), range(GOOD)))
    assert [one.status_code for one in found] == [200] * GOOD
    assert all(one.json()["label"] == answer["label"] for one in found)


def test_half_requests_hold_nobody_up(
    server: Running, connect: Callable[[], socket.socket]
) -> None:
    """Connections without a byte, with half a head, and with half a body, a byte at a time."""
    answer, pids = server.predict("cls", SENTENCE).json(), server.pids("cls")
    beginnings = [b"", HEAD[:40].encode(), f"{HEAD}Content-Length: 500\r\n\r\nthe film".encode()]
    slow = [connect() for _ in range(SLOW)]
    for number, one in enumerate(slow):
        one.sendall(beginnings[number % 3])
    for _ in range(3):
        good_requests(server, answer)
        for number, one in enumerate(slow):
            if number % 3 == 2:
                one.sendall(b"x")
    # One that is finished after all is answered like any other.
    slow[2].sendall(b" " * (500 - len("the film") - 3))
    assert b" 200 " in slow[2].recv(1 << 16).split(b"\r\n")[0]
    assert server.pids("cls") == pids


def test_what_slow_clients_held_is_given_back(
    server: Running, connect: Callable[[], socket.socket]
) -> None:
    slow = [connect() for _ in range(SLOW)]
    for one in slow:
        one.sendall(f"{HEAD}Content-Length: 500\r\n\r\n".encode())
    _eventually(lambda: handles(server) > SLOW)
    for one in slow:
        one.close()
    _eventually(lambda: handles(server) < SLOW)  # Java has about a hundred of its own


def test_a_flood_is_answered_or_refused(
    server: Running, connect: Callable[[], socket.socket]
) -> None:
    """Everybody asks before anybody reads: 200, or 503 where the queue is full, never silence."""
    pids = server.pids("cls")
    body = f"{HEAD}Content-Length: {len(SENTENCE)}\r\nConnection: close\r\n\r\n{SENTENCE}"
    flood = [connect() for _ in range(FLOOD)]
    for one in flood:
        one.sendall(body.encode())
    statuses = []
    for one in flood:
        answer = http.client.HTTPResponse(one)
        answer.begin()
        statuses.append(answer.status)
        document = json.loads(answer.read())
        assert answer.status == 200 or document["code"] == 503
    assert len(statuses) == FLOOD
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= 100  # what the queue holds
    good_requests(server, server.predict("cls", SENTENCE).json())
    assert server.pids("cls") == pids


def test_clients_that_do_not_read_hold_nobody_up(
    server: Running, connect: Callable[[], socket.socket]
) -> None:
    """Many requests on one connection, and not an answer taken."""
    answer = server.predict("cls", SENTENCE).json()
    body = f"{HEAD}Content-Length: {len(SENTENCE)}\r\n\r\n{SENTENCE}".encode()
    deaf = [connect() for _ in range(10)]
    for one in deaf:
        one.sendall(body * 5)
    good_requests(server, answer)


def test_too_much_is_refused(server: Running, connect: Callable[[], socket.socket]) -> None:
    """Bodies, declared or not, and heads that never end."""
    pids = server.pids("cls")
    assert server.predict("cls", "x" * 30_000).status_code == 413
    chunked = server.session.post(
        f"{server.server.inference}/predictions/cls", data=iter([b"x" * 10_000] * 3), timeout=60
    )
    assert chunked.status_code == 413
    endless = connect()
    try:
        for number in range(200):
            endless.sendall(f"{HEAD if not number else ''}X-{number}: {'y' * 200}\r\n".encode())
        assert endless.recv(1 << 16).split(b" ")[1:2] != [b"200"]
    except ConnectionError:
        pass  # the server has hung up
    assert server.predict("cls", SENTENCE).status_code == 200
    assert server.pids("cls") == pids


def _eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
