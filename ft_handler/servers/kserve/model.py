"""A traced model as KServe's `Model`: batches of whatever comes at once, over REST and gRPC."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import kserve
import orjson

from ft_handler.config import CoreSettings, RawSettings, model_yaml
from ft_handler.errors import EngineLost
from ft_handler.request import spans
from ft_handler.request.replies import encode_error
from ft_handler.request.tracing import new_request_id, trace_of
from ft_handler.runtime import Ready, keep_out_of_collections, open_model
from ft_handler.servers import server_settings
from ft_handler.servers.batching import Batcher, BatchLimits
from ft_handler.servers.folder import response_timeout
from ft_handler.servers.inputs import not_explained
from ft_handler.servers.kserve import metrics
from ft_handler.servers.kserve.payloads import incoming_of, refuse, response_of
from ft_handler.servers.signature import signature
from ft_handler.types import Incoming

logger = logging.getLogger(__name__)


class EncoderModel(kserve.Model):  # type: ignore[misc]
    """A traced folder that answers through KServe's server.

    name    what clients call it
    source  a traced folder, or a traced file alone
    """

    def __init__(self, name: str, source: Path) -> None:
        super().__init__(name)
        self._source = source
        self._opened: Ready | None = None
        self._signature: dict[str, list[dict[str, Any]]] = {"inputs": [], "outputs": []}
        self._predictions: Batcher | None = None
        self._explanations: Batcher | None = None

    def load(self) -> bool:
        """Open the model and warm it up; raises FtHandlerError naming what is wrong."""
        settings = model_yaml(self._source)
        raw = RawSettings.of_model_dir(self._source, settings)
        limits = BatchLimits.of(settings, raw.read(CoreSettings))
        ready = open_model(
            self._source,
            raw,
            groups=server_settings(),
            gpu=0,
            name=self.name,
            # Windows make more sequences than requests.
            max_sequences=2 * max(64, limits.requests),
            answer_within=response_timeout(settings),
            tracer=spans.tracer(),
        )
        self._signature = signature(ready)
        keep_out_of_collections()
        self._opened = ready
        # One thread: a second batch at the same time would only slow the first one down.
        thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")

        def batcher(run: Any, limits: BatchLimits) -> Batcher:
            return Batcher(
                run,
                limits,
                thread,
                done=lambda stats: metrics.record(self.name, stats),
                lost=_end,
            )

        predictions = batcher(ready.pipeline.run, limits)
        self._predictions = predictions
        if ready.explainer is not None:
            # They are long: predictions get their turn between two of them.
            self._explanations = batcher(ready.explainer.run, replace(limits, requests=1))
        metrics.watch_queue(self.name, lambda: predictions.waiting)
        self.ready = True
        return True

    def get_input_types(self) -> list[dict[str, object]]:
        """The tensors that a request has to bring."""
        return self._signature["inputs"]

    def get_output_types(self) -> list[dict[str, object]]:
        """The tensors of an answer."""
        return self._signature["outputs"]

    def validate(self, payload: Any) -> Any:
        """The payload as it is: the request path says what is wrong, in its own words."""
        return payload

    async def predict(
        self,
        payload: Any,
        headers: Mapping[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> Any:
        """The answer, in the form of the asking.

        payload  an InferRequest gets an InferResponse; bytes, and what a parser made of them, get a
                 document; an Incoming gets its Reply, whatever that one's status

        Raises what KServe answers with a refusal's status and message.
        """
        assert self._predictions is not None, "load() comes first"
        return await _answer(payload, self._predictions, headers)

    async def explain(self, payload: Any, headers: Mapping[str, str] | None = None) -> Any:
        """What each word does for the answer; payloads, answers and errors are `predict`'s."""
        return await _answer(payload, self._explanations, headers)

    async def answers(self) -> bool:
        """Whether the model answers its own sample now, behind whatever waits."""
        if not self.ready or self._predictions is None:
            return False
        # Settings may leave no room for the sample: to be refused is an answer too.
        reply = await self._predictions.submit(Incoming(dict(self._ready.task.sample)))
        return reply.status < 500

    @property
    def _ready(self) -> Ready:
        assert self._opened is not None, "load() comes first"
        return self._opened


async def _answer(payload: Any, batcher: Batcher | None, headers: Mapping[str, str] | None) -> Any:
    tensors = isinstance(payload, kserve.InferRequest)
    if tensors:
        incoming = incoming_of(payload)
    else:
        incoming = payload if isinstance(payload, Incoming) else Incoming(payload)
    if batcher is None:
        reply = encode_error(not_explained())
    else:
        trace = trace_of(headers or {}, arrived=time.time(), request_id=new_request_id())
        reply = await batcher.submit(incoming, trace)
    if isinstance(payload, Incoming):
        return reply
    if reply.status != 200:
        refuse(reply, over_grpc=tensors and payload.from_grpc)
    return response_of(reply, payload) if tensors else orjson.loads(reply.body)


def _end(error: EngineLost) -> None:
    """End the process, which cannot use its device any more; whoever started it starts another."""
    logger.critical("the device is lost, this process ends: %s", error)
    logging.shutdown()
    # Not sys.exit: this is one thread of several, and what waits for the device waits for ever.
    os._exit(1)
