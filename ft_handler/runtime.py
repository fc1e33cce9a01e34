"""A traced folder, or a traced file alone, made ready to answer: what every server front opens."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ft_handler import tasks
from ft_handler.config import CoreSettings, RawSettings, Settings, limit_tokenizer_threads
from ft_handler.engine.base import Engine
from ft_handler.engine.select import engine_for
from ft_handler.errors import (
    ConfigError,
    EngineError,
    EnvironmentProblem,
    OutOfDeviceMemory,
)
from ft_handler.files import GEMM_TABLE, LABELS_FILE, OLDER_CONFIG_FILE
from ft_handler.model.bundle import load_model, read_info, read_tokenizer
from ft_handler.model.info import ModelInfo
from ft_handler.request.overlap import LEAST_PART_BYTES, PART_SECONDS, least_part
from ft_handler.request.pipeline import Pipeline
from ft_handler.request.spans import Spans
from ft_handler.request.work import bounds_of, tokens_in
from ft_handler.tasks.base import AnyTask, Loaded, Runner
from ft_handler.text.chunks import reader_of
from ft_handler.text.pieces import Pieces
from ft_handler.text.template import Template, mask_of
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming, Reply

logger = logging.getLogger(__name__)

#: What a device is timed over, to know how large parts of a batch are worth a launch: sequences of
#: a usual length, as many tokens as a part has on a fast GPU.
_TIMED_LENGTH, _TIMED_TOKENS = 128, 4096


@dataclass(frozen=True)
class Settled:
    """A traced file and the settings it is to be run with; they fit each other."""

    path: Path
    info: ModelInfo
    task: AnyTask
    core: CoreSettings
    own: Settings


def settle(
    source: Path,
    raw: RawSettings,
    groups: Iterable[type[Settings]] = (),
    model_file: str | None = None,
) -> Settled:
    """Read all settings and what the traced file says of itself, without loading the model.

    source      a folder with a traced file, such as an extracted archive, or the file alone
    groups      settings that the caller reads itself
    model_file  what the folder calls its traced file, where no setting says it

    Raises FtHandlerError naming what is missing, unknown or contradictory.
    """
    core = raw.read(CoreSettings)
    told = "model_file" in core.model_fields_set or model_file is None
    name = core.model_file if told else str(model_file)
    path = source if source.is_file() else source / name
    if not path.is_file():
        where = "setting 'model_file'" if told else "the manifest's serializedFile"
        raise ConfigError(f"{source} has no {name} ({where})")
    info = read_info(path)
    task = _task(core, info)
    others = {name: tasks.get(name).settings for name in tasks.names() if name != task.name}
    raw.refuse_unknown((CoreSettings, task.settings, *groups), others)
    _check(path, core, info, task)
    _note(raw, core, info)
    return Settled(path, info, task, core, raw.read(task.settings))


@dataclass(frozen=True)
class Ready:
    """A model that answers, and what it is.

    explainer  explains the answers; None where nobody asked for it, or the task cannot
    """

    pipeline: Pipeline[Any, Any, Any]
    explainer: Pipeline[Any, Any, Any] | None
    runner: Runner[Any, Any, Any]
    engine: Engine
    info: ModelInfo
    task: AnyTask
    device: torch.device


def open_model(
    source: Path,
    raw: RawSettings,
    *,
    groups: Iterable[type[Settings]] = (),
    gpu: int | None = None,
    name: str = "model",
    version: str | None = None,
    max_sequences: int = 128,
    model_file: str | None = None,
    answer_within: float | None = None,
    most_bytes: int | None = None,
    explains: bool = False,
    tracer: Any = None,
) -> Ready:
    """Load settings, library, model and tokenizer, and warm up.

    source, groups, model_file  as in `settle`
    gpu                         the GPU that this process was given, None is a CPU worker
    max_sequences               sequences that a captured batch may have
    answer_within               seconds after which whoever asks gives a batch up; None is never
    most_bytes                  of one reply's body; None is no bound
    explains                    explain answers, where that can be done, without a setting that asks
                                for it
    tracer                      OpenTelemetry's, as `spans.tracer` gives it; None writes no spans

    Raises FtHandlerError naming what is missing, unknown or contradictory, and EngineError for a
    model that cannot answer its own sample.
    """
    start = time.perf_counter()
    settled = settle(source, raw, groups, model_file)
    path, info, task, core = settled.path, settled.info, settled.task, settled.core
    folder = None if source.is_file() else source
    device = choose_device(core.device, gpu)
    if core.num_threads is not None:
        torch.set_num_threads(core.num_threads)
        limit_tokenizer_threads(core.num_threads)  # before a tokenizer first works
    loaded = loaded_of(settled, folder)
    runner = task.runner(settled.own, loaded)
    explains = core.captum_explanation or (explains and loaded.mask is not None)
    explanation = task.explanation() if explains else None
    explaining = explanation and explanation.runner(settled.own, loaded)
    model = load_model(path, device, folder)
    if core.batch_invariant:
        model.fused.configure("batch_invariant")
    if device.type == "cuda":
        load_gemm_plans(folder, device)  # before graphs are captured
    engine = engine_for(
        model,
        device,
        max_tokens=core.max_batch_tokens,
        max_sequences=max_sequences,
        graph_memory=core.cuda_graph_memory_mb << 20,
    )
    names = {"model_name": name} | ({} if version is None else {"model_version": version})
    if core.warmup:
        logger.info("warm-up: %s", json.dumps(engine.warm_up()))

    def measure(seconds: float, longest: int = runner.longest, sequences: int = 1) -> int:
        return tokens_in(seconds, engine, longest, info.vocab_size, time.perf_counter, sequences)

    bounds = bounds_of(core, answer_within, measure)
    logger.info(
        "tokens at most: %s of a request, %s of what comes together", bounds.request, bounds.batch
    )

    part = LEAST_PART_BYTES
    if core.warmup and engine.overlaps:
        length = min(_TIMED_LENGTH, runner.longest)
        count = max(1, min(_TIMED_TOKENS, core.max_batch_tokens) // length)
        with suppress(OutOfDeviceMemory):  # small parts, then
            part = least_part(measure(PART_SECONDS, length, count))
        logger.info("a large batch goes in parts of at least %d bytes of text", part)

    def pipeline_of(
        task: AnyTask, runner: Runner[Any, Any, Any], operation: str
    ) -> Pipeline[Any, Any, Any]:
        return Pipeline(
            task,
            runner,
            engine,
            core,
            max_positions=info.max_positions,
            model=names,
            bounds=bounds,
            least_part=part,
            most_bytes=most_bytes,
            spans=None if tracer is None else Spans(tracer, operation, names),
        )

    pipeline = pipeline_of(task, runner, "predict")
    explainer = None
    if explanation and explaining:
        explainer = pipeline_of(explanation, explaining, "explain")
    if core.warmup:
        for _ in range(3):
            replies, _ = pipeline.run([Incoming(dict(task.sample))] * 4)
            _hold_sample(replies)
    logger.info(
        "%s ready in %.1f s: %s, %s, %d layers of %d, on %s",
        name,
        time.perf_counter() - start,
        task.name,
        info.data_type,
        info.num_layers,
        info.hidden_size,
        device,
    )
    return Ready(pipeline, explainer, runner, engine, info, task, device)


def loaded_of(settled: Settled, folder: Path | None) -> Loaded:
    """The tokenizer and the labels of a folder, or of the traced file alone.

    Raises ConfigError where they, the file and the settings do not fit each other.
    """
    info, core = settled.info, settled.core
    tokenizer = load_tokenizer(
        folder,
        core.tokenizer_file,
        core.do_lower_case,
        carried=read_tokenizer(settled.path),
        vocabulary_lower=info.do_lower_case,
    )
    if tokenizer.get_vocab_size() > info.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, but the traced file was made "
            f"for {info.vocab_size}: they do not belong together"
        )
    named = read_labels(folder, info) if folder and settled.task.labelled else None
    return Loaded(
        info,
        named or info.labels,
        reader_of(tokenizer, core.remember_chunks),
        Template(tokenizer, info.type_vocab_size),
        core.max_length or info.max_positions,
        Pieces(tokenizer),
        mask_of(tokenizer),
        core.max_explained_words,
    )


def keep_out_of_collections() -> None:
    """What lives now lives as long as the process: leave it out of later garbage collections."""
    gc.collect()
    gc.freeze()


def _hold_sample(replies: Sequence[Reply]) -> None:
    """Refuse a model that fails on its own sample; where settings refuse the sample, say so.

    Raises EngineError.
    """
    worst = max(replies, key=lambda reply: reply.status)
    if worst.status == 200:
        return
    said = f"the warm-up sample is answered {worst.status} ({_message(worst)})"
    if worst.status >= 500:
        raise EngineError(f"{said}: this model cannot answer here; the log has the cause")
    logger.warning("%s: the settings leave no room for it", said)


def _message(reply: Reply) -> str:
    """What an error's body says."""
    return str(json.loads(reply.body)["message"])


def _note(raw: RawSettings, core: CoreSettings, info: ModelInfo) -> None:
    """Say in the log which older settings say otherwise than the traced file, which is served."""
    if raw.older_mode not in (None, info.mode):
        logger.warning(
            "the mode in %s is not that of the traced file, which is served: %s",
            OLDER_CONFIG_FILE,
            info.mode,
        )
    if core.save_mode == "pretrained":
        logger.warning("setting 'save_mode' is pretrained, but the traced file is what is served")


def _task(core: CoreSettings, info: ModelInfo) -> AnyTask:
    """The task that a file is served for: its own, or one that the settings name and that shares
    its head."""
    own = tasks.get(info.mode)
    if core.mode in (None, info.mode):
        return own
    wished = tasks.get(str(core.mode)) if core.mode in tasks.names() else None
    if wished is None or wished.auto_class != own.auto_class:
        raise ConfigError(f"setting 'mode' is {core.mode}, but the traced file is for {info.mode}")
    return wished


def _check(path: Path, core: CoreSettings, info: ModelInfo, task: AnyTask) -> None:
    """Refuse settings that the traced file contradicts."""
    if info.model_type != "thsext":
        raise ConfigError(
            f"{path.name} is of model_type '{info.model_type}', which pads and is "
            "there for comparison: trace with --model_type thsext"
        )
    if task.labelled and core.num_labels not in (None, 0, info.num_labels):
        raise ConfigError(
            f"setting 'num_labels' is {core.num_labels}, but the traced file has {info.num_labels}"
        )
    if core.captum_explanation and task.explanation() is None:
        raise ConfigError(
            f"setting 'captum_explanation' is true, but answers of {task.name} are not explained"
        )
    if core.max_length is not None and core.max_length > info.max_positions:
        raise ConfigError(
            f"setting 'max_length' is {core.max_length}, but the model has "
            f"{info.max_positions} positions"
        )


def choose_device(wish: str, gpu: int | None) -> torch.device:
    """The device for `device: auto|cpu|cuda`; raises ConfigError when there is no GPU to insist on.

    gpu  what this process was given; None is a CPU worker
    """
    if wish == "cpu" or (wish == "auto" and (gpu is None or not torch.cuda.is_available())):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("setting 'device' is cuda, but torch sees no GPU")
    return torch.device("cuda", gpu or 0)


def load_gemm_plans(folder: Path | None, device: torch.device) -> None:
    """Use the folder's table of `ft-handler tune`, else the machine's own, else none.

    Raises EnvironmentProblem for a table of the machine's that does not fit its GPU; an archive may
    travel, so a table in it that does not fit is left alone with a warning.
    """
    from ft_handler.tuning.table import load_table

    index = device.index or 0
    count = None
    if folder is not None and (folder / GEMM_TABLE).is_file():
        try:
            count = load_table(folder / GEMM_TABLE, index)
        except EnvironmentProblem as error:
            logger.warning("the archive's GEMM table is not used: %s", error)
    if count is None:
        count = load_table(None, index)
    logger.info("%d measured GEMM plans", count)


def read_labels(folder: Path, info: ModelInfo) -> Mapping[int, str] | None:
    """`index_to_name.json` as label names, None without the file; raises ConfigError."""
    path = folder / LABELS_FILE
    if not path.is_file():
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
