"""Batches of what comes at the same time, for servers on asyncio that have none of their own.

While one batch is computed in a thread, what comes meanwhile waits and is the next one. Only an
idle thread waits for company, and no longer than it was told to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ft_handler.config import CoreSettings
from ft_handler.errors import EngineLost, InternalError, Overloaded, RequestError
from ft_handler.request.failures import log_failure
from ft_handler.request.replies import encode_error
from ft_handler.servers.folder import batching, most_waiting
from ft_handler.servers.inputs import size_of
from ft_handler.stats import BatchStats
from ft_handler.types import Incoming, Reply, Trace

#: Bytes of a body that make a token, as texts in English do; others make more of them.
_BYTES_A_TOKEN = 4


class Run(Protocol):
    """What `Pipeline.run` is: replies to a batch, in order, and its figures."""

    def __call__(
        self, incoming: Sequence[Incoming | RequestError], *, traces: Sequence[Trace | None]
    ) -> tuple[list[Reply], BatchStats]: ...


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """When a batch is full, and how many requests may wait for one.

    requests  most requests of a batch
    size      most bytes of their bodies; a larger body is a batch by itself
    delay     seconds that the first one of a batch waits for others
    waiting   most requests that wait; one more is refused
    """

    requests: int
    size: int
    delay: float
    waiting: int

    @classmethod
    def of(cls, model_yaml: Mapping[str, object], core: CoreSettings) -> BatchLimits:
        """Those of `batchSize`, `maxBatchDelay` (milliseconds) and `jobQueueSize`.

        Beyond `max_batch_tokens` the encoder takes a batch in parts, so that nothing is gained by
        having the first part wait for the last. Raises ConfigError.
        """
        told = batching(model_yaml)
        size = core.max_batch_tokens * _BYTES_A_TOKEN
        return cls(told.size, size, told.delay, most_waiting(model_yaml))


@dataclass(slots=True)
class _Waiting:
    incoming: Incoming | RequestError
    trace: Trace | None
    size: int
    since: float
    reply: asyncio.Future[Reply]


class Batcher:
    """Answers requests in batches; of one event loop.

    run     answers a batch, in a thread of `thread`
    done    is told every batch's figures
    lost    is told that the process cannot use its device any more and has to end
    """

    def __init__(
        self,
        run: Run,
        limits: BatchLimits,
        thread: Executor,
        *,
        done: Callable[[BatchStats], None],
        lost: Callable[[EngineLost], None],
    ) -> None:
        self._run, self._limits, self._thread = run, limits, thread
        self._done, self._lost = done, lost
        self._waiting: deque[_Waiting] = deque()
        self._size = 0
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many requests wait for a batch."""
        return len(self._waiting)

    async def submit(self, incoming: Incoming | RequestError, trace: Trace | None = None) -> Reply:
        """The reply to one request, or to what a server refuses itself; too many get a 503."""
        if len(self._waiting) >= self._limits.waiting:
            return encode_error(Overloaded())
        loop = asyncio.get_running_loop()
        one = _Waiting(incoming, trace, size_of(incoming), loop.time(), loop.create_future())
        self._waiting.append(one)
        self._size += one.size
        self._came.set()
        if self._task is None:
            self._task = loop.create_task(self._serve())
        return await one.reply

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._fill(loop)
            batch = self._take()
            if not batch:
                continue
            try:
                run = partial(
                    self._run,
                    [one.incoming for one in batch],
                    traces=[one.trace for one in batch],
                )
                replies, stats = await loop.run_in_executor(self._thread, run)
            except Exception as error:
                if isinstance(error, EngineLost):
                    self._lost(error)
                else:
                    log_failure("batch", error)
                replies = [encode_error(InternalError())] * len(batch)
                stats = BatchStats(requests=len(batch), failed=len(batch))
            for one, reply in zip(batch, replies, strict=True):
                if not one.reply.done():  # its client may have gone meanwhile
                    one.reply.set_result(reply)
            self._done(stats)

    async def _fill(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for a request, and then for a full batch as long as that one may wait."""
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        until = self._waiting[0].since + self._limits.delay
        while not self._full() and (left := until - loop.time()) > 0:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except asyncio.TimeoutError:
                return

    def _full(self) -> bool:
        return len(self._waiting) >= self._limits.requests or self._size >= self._limits.size

    def _take(self) -> list[_Waiting]:
        """The next batch, without requests whose clients have gone."""
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < self._limits.requests:
            one = self._waiting[0]
            gone = one.reply.cancelled()
            if batch and not gone and size + one.size > self._limits.size:
                break
            self._waiting.popleft()
            self._size -= one.size
            if not gone:
                batch.append(one)
                size += one.size
        return batch
