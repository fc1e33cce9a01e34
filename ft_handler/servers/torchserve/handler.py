"""TorchServe's context in, replies out: one class around the pipeline."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ft_handler.config import (
    HandlerConfig,
    keep_results_batch_invariant,
    limit_tokenizer_threads,
)
from ft_handler.engine.select import engine_for
from ft_handler.errors import ConfigError, EngineLost, EnvironmentProblem, FtHandlerError
from ft_handler.model.bundle import load_model
from ft_handler.model.info import ModelInfo
from ft_handler.request.pipeline import BatchStats, Pipeline
from ft_handler.servers.torchserve import metrics, receive
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Reply

logger = logging.getLogger(__name__)

LABELS_FILE = "index_to_name.json"
GEMM_TABLE = "gemm_table.json"


class FtHandler:
    """One worker's model: loaded once, then asked batch by batch."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._stats: BatchStats | None = None
        self._metrics = False

    def initialize(self, ctx: Any) -> None:
        """Load settings, library, model and tokenizer of the archive, and warm up.

        Raises FtHandlerError naming what is wrong; TorchServe then reports the worker's death.
        """
        try:
            self._load(ctx)
        except FtHandlerError as error:
            logger.error("ft_handler cannot serve %s: %s", ctx.model_name, error)
            raise

    def _load(self, ctx: Any) -> None:
        start = time.perf_counter()
        properties = ctx.system_properties
        model_dir = Path(properties["model_dir"])
        config = HandlerConfig.from_model_dir(model_dir, ctx.model_yaml_config)
        device = choose_device(config.device, properties.get("gpu_id"))
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
            limit_tokenizer_threads(config.num_threads)
        if config.batch_invariant:
            keep_results_batch_invariant()
        model_path = model_dir / config.model_file
        if not model_path.is_file():
            raise ConfigError(f"the archive has no {config.model_file} (setting 'model_file')")
        model = load_model(model_path, device, model_dir)
        info = model.info
        if info.model_type != "thsext":
            raise ConfigError(
                f"{config.model_file} is of model_type '{info.model_type}', which pads and is "
                "there for comparison: trace with --model_type thsext"
            )
        lower = config.do_lower_case
        if lower is None and not (model_dir / config.tokenizer_file).is_file():
            lower = info.do_lower_case
        tokenizer = load_tokenizer(model_dir, config.tokenizer_file, lower)
        if device.type == "cuda":
            load_gemm_plans(model_dir, device)  # before graphs are captured
        engine = engine_for(
            model,
            device,
            max_tokens=config.max_batch_tokens,
            # Question answering makes more sequences than requests.
            max_sequences=2 * max(64, properties.get("batch_size") or 1),
            graph_memory=config.cuda_graph_memory_mb << 20,
        )
        manifest = (ctx.manifest or {}).get("model", {})
        version = manifest.get("modelVersion")
        self._pipeline = Pipeline(
            config,
            info,
            tokenizer,
            engine,
            labels=read_labels(model_dir, info),
            model_name=ctx.model_name,
            model_version=None if version is None else str(version),
            observe=self._keep,
        )
        self._metrics = config.metrics
        if config.fast_receive:
            receive.install()
        if config.warmup:
            took = engine.warm_up()
            logger.info("warm-up: %s", json.dumps(took))
            _warm_up(self._pipeline, info.mode)
        # What lives now lives as long as the worker: keep it out of later collections.
        gc.collect()
        gc.freeze()
        logger.info(
            "%s ready in %.1f s: %s, %s, %d layers of %d, on %s",
            ctx.model_name,
            time.perf_counter() - start,
            info.mode,
            info.data_type,
            info.num_layers,
            info.hidden_size,
            device,
        )

    def _keep(self, stats: BatchStats) -> None:
        self._stats = stats

    def handle(self, data: Sequence[Mapping[str, Any]], ctx: Any) -> list[bytes]:
        """One body a request; status and content type go through `ctx`."""
        assert self._pipeline is not None
        try:
            replies = self._pipeline.run(data)
        except EngineLost as error:
            # TorchServe starts a worker that ends again; one that raises would stay broken.
            logger.critical("the device is lost, this worker ends: %s", error)
            sys.exit(1)
        for index, reply in enumerate(replies):
            _answer(ctx, index, reply)
        if self._metrics and self._stats is not None:
            metrics.emit(ctx.metrics, self._stats)
        return [reply.body for reply in replies]


def _answer(ctx: Any, index: int, reply: Reply) -> None:
    ctx.set_response_content_type(index, reply.content_type)
    if reply.status != 200:
        ctx.set_response_status(reply.status, reply.reason, index)


def choose_device(wish: str, gpu_id: int | None) -> torch.device:
    """The device for `device: auto|cpu|cuda`; raises ConfigError when there is no GPU to insist on.

    gpu_id  what TorchServe assigned to this worker; None is a CPU worker
    """
    if wish == "cpu" or (wish == "auto" and (gpu_id is None or not torch.cuda.is_available())):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("setting 'device' is cuda, but torch sees no GPU")
    return torch.device("cuda", gpu_id or 0)


def load_gemm_plans(model_dir: Path, device: torch.device) -> None:
    """Use the archive's table of `ft-handler tune`, else the machine's own, else none.

    Raises EnvironmentProblem for a table of the machine's that does not fit its GPU; an archive may
    travel, so a table in it that does not fit is left alone with a warning.
    """
    from ft_handler.tuning.table import load_table

    carried = model_dir / GEMM_TABLE
    if carried.is_file():
        try:
            count = load_table(carried, device.index or 0)
        except EnvironmentProblem as error:
            logger.warning("the archive's GEMM table is not used: %s", error)
            count = load_table(None, device.index or 0)
    else:
        count = load_table(None, device.index or 0)
    logger.info("%d measured GEMM plans", count)


def read_labels(model_dir: Path, info: ModelInfo) -> dict[int, str] | None:
    """`index_to_name.json` as label names, None without the file; raises ConfigError."""
    path = model_dir / LABELS_FILE
    if info.mode != "sequence_classification" or not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        labels = {int(index): name for index, name in raw.items()}
    except (ValueError, AttributeError):
        raise ConfigError(f'{LABELS_FILE} must be like {{"0": "negative", ...}}') from None
    if not all(isinstance(name, str) for name in labels.values()):
        raise ConfigError(f"{LABELS_FILE} must map numbers to strings")
    if sorted(labels) != list(range(info.num_labels)):
        raise ConfigError(
            f"{LABELS_FILE} names the labels {sorted(labels)}, but the traced file has "
            f"{info.num_labels}, numbered from 0"
        )
    return labels


def _warm_up(pipeline: Pipeline, mode: str) -> None:
    """Run the whole path a few times; nothing of it is counted."""
    item: object = "a warm word"
    if mode == "question_answering":
        item = {"question": "what is warm", "context": "a warm word"}
    for _ in range(3):
        pipeline.run([{"body": item}] * 4)
