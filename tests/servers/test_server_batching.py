"""Batches on asyncio: what comes at once is computed together, in bounds, and nobody is lost."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ft_handler.config import CoreSettings
from ft_handler.errors import ConfigError, EngineLost, MalformedRequest, RequestError
from ft_handler.servers.batching import Batcher, BatchLimits
from ft_handler.stats import BatchStats
from ft_handler.types import Incoming, Reply, Trace

TEXT = "zanzibar"
LIMITS = BatchLimits(requests=4, size=100, delay=0.0, waiting=100)


class Echo:
    """A pipeline that answers a body with itself, one batch at a time, when it is let to."""

    def __init__(self) -> None:
        self.batches: list[list[object]] = []
        self.traces: list[Trace | None] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, incoming, *, traces):
        self.traces += traces
        bodies = [
            type(one).__name__ if isinstance(one, RequestError) else one.body for one in incoming
        ]
        self.batches.append(bodies)
        self.begun.set()
        assert self.go.wait(60)
        if "raise" in bodies:
            raise ValueError(TEXT)
        if "lose" in bodies:
            raise EngineLost("gone")
        replies = [Reply(200, "OK", str(body).encode()) for body in bodies]
        return replies, BatchStats(requests=len(bodies))


def of(echo, limits=LIMITS, figures=None, lost=None):
    return Batcher(
        echo,
        limits,
        ThreadPoolExecutor(1),
        done=(figures if figures is not None else []).append,
        lost=(lost if lost is not None else []).append,
    )


async def held(batcher, echo, *bodies):
    """Tasks of requests that wait while the thread computes one more, "first"."""
    echo.go.clear()
    first = asyncio.create_task(batcher.submit(Incoming("first")))
    await asyncio.to_thread(echo.begun.wait, 60)
    tasks = [asyncio.create_task(batcher.submit(Incoming(body))) for body in bodies]
    while batcher.waiting < len(bodies):
        await asyncio.sleep(0)
    return first, tasks


def test_what_comes_while_a_batch_is_computed_is_the_next_one():
    async def main():
        echo, figures = Echo(), []
        batcher = of(echo, figures=figures)
        first, tasks = await held(batcher, echo, *"abcdef")
        echo.go.set()
        replies = await asyncio.gather(first, *tasks)
        assert [r.body.decode() for r in replies] == ["first", *"abcdef"]
        assert echo.batches == [["first"], list("abcd"), list("ef")]
        assert [f.requests for f in figures] == [1, 4, 2]
        assert batcher.waiting == 0

    asyncio.run(main())


def test_each_request_keeps_its_trace():
    async def main():
        echo = Echo()
        batcher = of(echo, replace(LIMITS, delay=3600.0))
        traces = [Trace(name) for name in "abcd"]
        requests = zip("abcd", traces, strict=True)
        await asyncio.gather(*(batcher.submit(Incoming(body), trace) for body, trace in requests))
        assert echo.batches == [list("abcd")]
        assert echo.traces == traces

    asyncio.run(main())


def test_a_batch_has_a_size_and_a_larger_body_is_one_by_itself():
    async def main():
        echo = Echo()
        large, half = "l" * 101, "h" * 60
        document = {"inputs": [{"data": [half]}]}
        first, tasks = await held(of(echo), echo, "a", large, half, document, "b")
        echo.go.set()
        await asyncio.gather(first, *tasks)
        assert echo.batches[1:] == [["a"], [large], [half], [document, "b"]]

    asyncio.run(main())


def test_an_idle_thread_waits_for_company_until_the_batch_is_full():
    async def main():
        echo = Echo()
        batcher = of(echo, replace(LIMITS, delay=3600.0))  # who waits that long fails
        await asyncio.gather(*(batcher.submit(Incoming(body)) for body in "abcd"))
        assert echo.batches == [list("abcd")]
        await asyncio.gather(*(batcher.submit(Incoming("x" * 50)) for _ in range(2)))
        assert len(echo.batches) == 2

    asyncio.run(main())


def test_company_is_not_waited_for_longer_than_told():
    async def main():
        echo = Echo()
        assert (await of(echo, replace(LIMITS, delay=0.01)).submit(Incoming("a"))).body == b"a"

    asyncio.run(main())


def test_one_too_many_is_refused_at_once():
    async def main():
        echo = Echo()
        batcher = of(echo, replace(LIMITS, waiting=2))
        first, tasks = await held(batcher, echo, "a", "b")
        refused = await batcher.submit(Incoming("c"))
        assert (refused.status, json.loads(refused.body)["type"]) == (503, "Overloaded")
        echo.go.set()
        assert [r.status for r in await asyncio.gather(first, *tasks)] == [200] * 3

    asyncio.run(main())


def test_a_client_that_has_gone_costs_nothing():
    async def main():
        echo = Echo()
        first, (gone, stays) = await held(of(echo), echo, "gone", "stays")
        gone.cancel()
        first.cancel()  # under way: its answer has nobody
        await asyncio.sleep(0)
        echo.go.set()
        assert (await stays).body == b"stays"
        assert echo.batches == [["first"], ["stays"]]

    asyncio.run(main())


def test_a_failure_takes_its_batch_alone(caplog):
    async def main():
        echo, figures = Echo(), []
        batcher = of(echo, figures=figures)
        first, tasks = await held(batcher, echo, "raise", "b")
        echo.go.set()
        await first
        for reply in await asyncio.gather(*tasks):
            assert (reply.status, json.loads(reply.body)["message"]) == (500, "internal error")
        assert figures[-1].failed == 2
        assert (await batcher.submit(Incoming("after"))).status == 200

    asyncio.run(main())
    assert "ValueError" in caplog.text
    assert TEXT not in caplog.text


def test_a_lost_device_is_told():
    async def main():
        lost = []
        assert (await of(Echo(), lost=lost).submit(Incoming("lose"))).status == 500
        assert [str(error) for error in lost] == ["gone"]

    asyncio.run(main())


def test_what_the_server_refuses_goes_through_and_is_counted():
    async def main():
        assert (await of(Echo()).submit(MalformedRequest("no"))).body == b"MalformedRequest"

    asyncio.run(main())


def test_limits_are_those_of_torchserves_settings():
    core = CoreSettings(max_batch_tokens=1000)
    found = BatchLimits.of({"batchSize": 8, "maxBatchDelay": 20, "jobQueueSize": 9}, core)
    assert found == BatchLimits(requests=8, size=4000, delay=0.02, waiting=9)
    assert BatchLimits.of({}, core) == BatchLimits(32, 4000, 0.005, 1000)


@pytest.mark.parametrize(
    ("name", "value"), [("batchSize", 0), ("maxBatchDelay", -1), ("jobQueueSize", True)]
)
def test_a_setting_that_is_none_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        BatchLimits.of({name: value}, CoreSettings())
