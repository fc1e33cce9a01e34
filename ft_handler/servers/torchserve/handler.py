"""TorchServe's context in, replies out: one class around the pipeline."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ft_handler.config import CoreSettings, RawSettings
from ft_handler.errors import EngineLost, FtHandlerError
from ft_handler.request import spans
from ft_handler.request.tracing import REQUEST_ID, trace_of
from ft_handler.runtime import Ready, keep_out_of_collections, open_model
from ft_handler.servers.answers import answers
from ft_handler.servers.folder import response_timeout
from ft_handler.servers.torchserve import envelope, metrics, oip, receive
from ft_handler.servers.torchserve.adapter import DESCRIBE, EXPLAIN, incoming, over_grpc, purpose
from ft_handler.servers.torchserve.settings import TorchServeSettings
from ft_handler.stats import BatchStats
from ft_handler.types import Reply

logger = logging.getLogger(__name__)

#: TorchServe writes an id of its own over X-Request-Id.
_OWN_NAMES = {REQUEST_ID: "X-Client-Request-Id"}


class Worker:
    """One worker's model, asked batch by batch.

    reporter  whom each batch's figures are told; None is nobody
    model     `model_name` and `model_version`, for answers that have to say them
    """

    def __init__(
        self, ready: Ready, reporter: metrics.Reporter | None, model: Mapping[str, str]
    ) -> None:
        self._pipeline, self._explainer = ready.pipeline, ready.explainer
        self._model = model
        self._reporter = reporter
        served = replace(ready.info, mode=ready.task.name)  # settings may choose another task
        self._description = Reply(200, "OK", served.to_json().encode())

    def handle(self, data: Sequence[Mapping[str, object]], ctx: Any) -> list[bytes]:
        """One body a request; status and content type go through `ctx`."""
        headers = [ctx.get_all_request_header(index) for index in range(len(data))]
        asked = [purpose(own) for own in headers]
        grpc = [over_grpc(own) for own in headers]
        calls = {
            i: oip.document_of(data[i])
            for i, own in enumerate(headers)
            if grpc[i] and oip.is_call(own)
        }
        try:
            replies, stats = self._replies(data, headers, asked, calls)
        except EngineLost as error:
            # TorchServe starts a worker that ends again; one that raises would stay broken.
            logger.critical("the device is lost, this worker ends: %s", error)
            sys.exit(1)
        for index, call in calls.items():
            replies[index] = oip.answer(replies[index], call, self._model)
        for index, reply in enumerate(replies):
            _answer(ctx, index, reply, grpc[index])
        stats.undecodable = receive.undecodable.take()
        if self._reporter is not None:
            self._reporter.report(stats)
        return [reply.body for reply in replies]

    def _replies(
        self,
        data: Sequence[Mapping[str, object]],
        headers: Sequence[Mapping[str, str]],
        asked: Sequence[str | None],
        calls: Mapping[int, Mapping[str, object]],
    ) -> tuple[list[Reply], BatchStats]:
        """One reply a request, whatever it is for."""
        everyone = range(len(data))
        explains = self._explainer is not None
        explained = [i for i in everyone if asked[i] is EXPLAIN and explains]
        others = {i for i in everyone if asked[i] is DESCRIBE}.union(explained)
        predicted = [i for i in everyone if i not in others]
        predictions, explanations, stats = answers(
            self._pipeline,
            self._explainer,
            [
                oip.incoming(calls[i]) if i in calls else incoming(data[i], headers[i], asked[i])
                for i in predicted
            ],
            [incoming(data[i], headers[i]) for i in explained],
            [trace_of(headers[i]) for i in predicted],
            [trace_of(headers[i]) for i in explained],
        )
        if len(predictions) == len(data):
            return predictions, stats
        replies = [self._description] * len(data)
        for places, answered in ((predicted, predictions), (explained, explanations)):
            for index, reply in zip(places, answered, strict=True):
                replies[index] = reply
        return replies, stats


def load(ctx: Any) -> Worker:
    """The worker of an extracted archive, warmed up.

    Raises FtHandlerError naming what is wrong; TorchServe then reports the worker's death.
    """
    try:
        return _load(ctx)
    except FtHandlerError as error:
        logger.error("ft_handler cannot serve %s: %s", ctx.model_name, error)
        raise


def _load(ctx: Any) -> Worker:
    envelope.refuse(envelope.of_this_load())
    properties = ctx.system_properties
    folder = Path(properties["model_dir"])
    raw = RawSettings.of_model_dir(folder, ctx.model_yaml_config)
    settings = raw.read(TorchServeSettings)
    model = (ctx.manifest or {}).get("model", {})
    version = model.get("modelVersion")
    receive.quieten()
    if settings.fast_receive:
        receive.install()
    ready = open_model(
        folder,
        raw,
        groups=(TorchServeSettings,),
        gpu=properties.get("gpu_id"),
        name=ctx.model_name,
        version=None if version is None else str(version),
        # Windows make more sequences than requests.
        max_sequences=2 * max(64, properties.get("batch_size") or 1),
        model_file=model.get("serializedFile"),
        answer_within=response_timeout(ctx.model_yaml_config),
        most_bytes=settings.most_bytes(),
        tracer=spans.tracer(),
    )
    keep_out_of_collections()
    reporter = None
    if settings.metrics and ctx.metrics is not None:
        limits = {
            metrics.BATCH_SIZE: properties.get("batch_size") or 1,
            metrics.BATCH_TOKENS: raw.read(CoreSettings).max_batch_tokens,
        }
        reporter = metrics.Reporter(ctx.metrics, ctx.model_name)
        reporter.begin(limits)
    names = {"model_name": str(ctx.model_name), "model_version": str(version or "")}
    return Worker(ready, reporter, names)


def _answer(ctx: Any, index: int, reply: Reply, grpc: bool) -> None:
    ctx.set_response_content_type(index, reply.content_type)
    if reply.status != 200:
        ctx.set_response_status(reply.status, reply.reason, index)
    if grpc:
        # Ends a StreamPredictions call; without it TorchServe's front throws and the worker dies.
        # Predictions ignores it, and over HTTP it would keep the client waiting. Other headers
        # would be dropped.
        ctx.set_response_header(index, "ts_stream_next", "false")
        return
    for name, value in reply.headers.items():
        ctx.set_response_header(index, _OWN_NAMES.get(name, name), value)
