"""One replica of a model on Ray Serve: loads it, makes batches, answers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from ft_handler.config import model_yaml
from ft_handler.errors import EngineLost
from ft_handler.servers.folder import batching
from ft_handler.servers.inputs import size_of
from ft_handler.servers.ray.asked import Asked, cost_of
from ft_handler.servers.ray.options import ModelOptions
from ft_handler.servers.ray.passed import Passed
from ft_handler.servers.web import app
from ft_handler.types import Incoming, Reply, Trace

logger = logging.getLogger(__name__)


class Replica:
    """A loaded model that answers over HTTP, and through handles when another one speaks HTTP."""

    def __init__(self, options: ModelOptions, max_request_size: int) -> None:
        # Who builds an application or passes requests on has no use for torch.
        from ft_handler.servers.ray.loaded import Loaded

        yaml = model_yaml(Path(options.model))
        batches = batching(yaml)
        self.version = options.version
        self._most = options.max_batch_size or batches.size
        self._bytes_a_request = options.max_batch_bytes / self._most
        # The model is loaded and asked in one thread, since torch keeps the number of its threads
        # by thread, and beside the loop, which takes requests meanwhile.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ft_handler")
        gpu = 0 if ray.get_gpu_ids() else None  # Ray shows a process its own GPUs alone
        self._model = self._thread.submit(Loaded, options, yaml, gpu, self._most).result()
        self._app = app({options.name: self}, max_request_size)
        self._free = asyncio.Event()
        self._free.set()
        delay = options.max_batch_delay
        self._batched = serve.batch(
            max_batch_size=self._most,
            batch_wait_timeout_s=batches.delay if delay is None else delay / 1000,
            batch_size_fn=cost_of,
        )(self._together)

    # -- what Ray Serve calls --

    async def __call__(self, request: Request) -> Response:
        """One HTTP request."""
        return Passed(self._app)

    async def check_health(self) -> None:
        """Raise where the model does not answer its sample; Ray then replaces this replica."""
        # Beside the queue of requests: however long that is, no more than a batch comes first.
        (reply,) = await self._in_thread([Asked(self._model.sample, False, 1)])
        if reply.status >= 500:
            raise RuntimeError(f"the sample is answered {reply.status}")

    # -- a model as `ft_handler.servers.web` asks it --

    async def answer(
        self, incoming: Incoming, explain: bool = False, trace: Trace | None = None
    ) -> Reply:
        """The answer to a request, which shares its batch with what comes at the same time."""
        # Ray makes batches of what has come even while none can be computed, and small ones then
        # queue up. What waits here until the model is free makes one batch instead.
        await self._free.wait()
        cost = min(self._most, max(1.0, size_of(incoming) / self._bytes_a_request))
        reply: Reply = await self._batched(Asked(incoming, explain, cost, trace))
        return reply

    async def ready(self) -> bool:
        """True: a replica that answers this has loaded its model and answered its sample."""
        return True

    async def signature(self) -> Mapping[str, Any]:
        """The model's tensors."""
        return self._model.signature

    # -- batches --

    async def _together(self, asked: list[Asked]) -> list[Reply]:
        self._free.clear()
        try:
            return await self._in_thread(asked)
        finally:
            self._free.set()

    async def _in_thread(self, asked: Sequence[Asked]) -> list[Reply]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._model.replies, asked)
        except EngineLost as error:
            # Ray starts a replica in the place of one that ends; one that raises would stay broken.
            logger.critical("the device is lost, this replica ends: %s", error)
            logging.shutdown()
            os._exit(1)
