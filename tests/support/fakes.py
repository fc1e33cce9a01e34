"""Stand-ins for the engine and for TorchServe's context, and pipelines made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ft_handler import tasks
from ft_handler.config import MOST_EXPLAINED_WORDS, CoreSettings, RawSettings
from ft_handler.engine.base import Engine
from ft_handler.model.info import ModelInfo
from ft_handler.request.pipeline import Pipeline
from ft_handler.request.work import Bounds
from ft_handler.tasks.base import AnyTask, Loaded, Runner
from ft_handler.text.chunks import reader_of
from ft_handler.text.pieces import Pieces
from ft_handler.text.template import Template, mask_of
from ft_handler.types import Floats, Item, PackedBatch


def model_info(mode: str = "sequence_classification", **changes: Any) -> ModelInfo:
    """A traced file's description, for the tiny vocabulary and three labels."""
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    labelled = tasks.get(mode).labelled
    values: dict[str, Any] = {
        "format_version": 1,
        "mode": mode,
        "architecture": "bert",
        "data_type": "fp32",
        "model_type": "thsext",
        "remove_padding": True,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 128,
        "max_positions": 128,
        "vocab_size": 4096,
        "type_vocab_size": 2,
        "num_labels": 3 if labelled else 2,
        "labels": labels if labelled else {},
        "problem_type": None,
        "do_lower_case": True,
        "layer_norm_eps": 1e-12,
        "versions": {},
    }
    return ModelInfo(**{**values, **changes})


def loaded(
    tokenizer: Tokenizer,
    info: ModelInfo,
    labels: Mapping[int, str] | None = None,
    max_length: int | None = None,
    most_words: int = MOST_EXPLAINED_WORDS,
) -> Loaded:
    """What a worker has loaded when it asks a task for a runner."""
    return Loaded(
        info,
        info.labels if labels is None else labels,
        reader_of(tokenizer),
        Template(tokenizer, info.type_vocab_size),
        max_length or info.max_positions,
        Pieces(tokenizer),
        mask_of(tokenizer),
        most_words,
    )


def items_of(inputs: Sequence[Any]) -> list[Item[Any]]:
    """Inputs as the items of one request each."""
    return [Item(i, 0, value) for i, value in enumerate(inputs)]


def runner_of(
    mode: str,
    tokenizer: Tokenizer,
    max_length: int = 128,
    info: ModelInfo | None = None,
    **settings: object,
) -> Runner[Any, Any, Any]:
    """A task over a model of the tiny vocabulary."""
    task, info = tasks.get(mode), info or model_info(mode)
    chosen = task.settings(**settings)
    return task.runner(chosen, loaded(tokenizer, info, max_length=max_length))


def pipeline_of(
    tokenizer: Tokenizer,
    engine: Engine,
    mode: str = "sequence_classification",
    info: ModelInfo | None = None,
    clock: Callable[[], float] | None = None,
    bounds: Bounds | None = None,
    explains: bool = False,
    **settings: object,
) -> Pipeline[Any, Any, Any]:
    """A pipeline over an engine, with settings as a configuration file has them.

    explains  it explains the task's answers instead of giving them
    """
    task: AnyTask = tasks.get(mode)
    if explains:
        explanation = task.explanation()
        assert explanation is not None
        task = explanation
    raw = RawSettings({"the test": settings})
    raw.refuse_unknown((CoreSettings, task.settings), {})
    core, info = raw.read(CoreSettings), info or model_info(mode)
    runner = task.runner(
        raw.read(task.settings),
        loaded(tokenizer, info, max_length=core.max_length, most_words=core.max_explained_words),
    )
    return Pipeline(
        task,
        runner,
        engine,
        core,
        max_positions=info.max_positions,
        model={"model_name": "model"},
        **({} if clock is None else {"clock": clock}),
        **({} if bounds is None else {"bounds": bounds}),
    )


def sequence_logits(ids: np.ndarray, types: np.ndarray, width: int) -> np.ndarray:
    """Logits `[width]` that depend on every token, its place and its type."""
    place = np.arange(1, len(ids) + 1)
    mixed = ids * 7919 + place * 104729 + types * 1299709
    return np.array([np.sin(mixed * (k + 1) * 0.001).sum() for k in range(width)], np.float32)


def token_logits(ids: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits of one sequence; `[CLS]` is unlikely, so that answers are spans."""
    place = np.arange(len(ids))
    start = (4 * np.sin(ids * 1.7 + place * 0.31 + types)).astype(np.float32)
    end = (4 * np.sin(ids * 2.3 + place * 0.17 + types + 1)).astype(np.float32)
    start[0] = end[0] = -6
    return start, end


def label_logits(ids: np.ndarray, types: np.ndarray, width: int) -> np.ndarray:
    """Logits `[width, tokens]` of one sequence, which depend on each token and its place."""
    mixed = ids * 1.7 + np.arange(len(ids)) * 0.31 + types
    rows = [3 * np.sin(mixed * (k + 1)) for k in range(width)]
    return np.array(rows, np.float32).reshape(width, len(ids))


class _Done:
    def __init__(self, outputs: Floats) -> None:
        self._outputs = outputs

    def result(self) -> Floats:
        return self._outputs


class FakeEngine:
    """A deterministic function of the tokens, sequence by sequence; `fail` may raise first."""

    overlaps = False

    def __init__(
        self,
        mode: str = "sequence_classification",
        width: int = 3,
        fail: Callable[[PackedBatch], None] | None = None,
    ) -> None:
        task = tasks.get(mode)
        self.per_token, self.labelled = task.per_token, task.labelled
        self.width, self.fail = width, fail
        self.batches: list[PackedBatch] = []

    def launch(self, batch: PackedBatch) -> _Done:
        if self.fail is not None:
            self.fail(batch)
        if not ((batch.token_type_ids >= 0) & (batch.token_type_ids < 2)).all():
            raise ValueError("token_type_ids must lie in [0, 2)")
        if (batch.input_ids < 0).any():
            raise ValueError("input_ids must not be negative")
        self.batches.append(batch)
        assert batch.max_seqlen == np.diff(batch.cu_seqlens).max(initial=0)
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == batch.total == len(batch.token_type_ids)
        bounds = list(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True))
        pieces = [(batch.input_ids[a:b], batch.token_type_ids[a:b]) for a, b in bounds]
        if self.per_token and self.labelled:
            rows = [label_logits(*p, self.width) for p in pieces]
            return _Done(np.concatenate(rows, axis=1))
        if self.per_token:
            starts, ends = zip(*(token_logits(*p) for p in pieces), strict=True)
            return _Done(np.stack([np.concatenate(starts), np.concatenate(ends)]))
        return _Done(np.stack([sequence_logits(*p, self.width) for p in pieces]))

    def warm_up(self) -> dict[str, float]:
        return {"seconds": 0.0}


class AsyncEngine(FakeEngine):
    """Computes, and fails, only when it is waited for; `events` has the order of calls."""

    overlaps = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[str] = []

    def launch(self, batch: PackedBatch) -> _Later:  # type: ignore[override]
        self.events.append("launch")
        return _Later(self, batch)

    def compute(self, batch: PackedBatch) -> Floats:
        self.events.append("wait")
        return super().launch(batch).result()


class _Later:
    def __init__(self, engine: AsyncEngine, batch: PackedBatch) -> None:
        self._engine, self._batch = engine, batch

    def result(self) -> Floats:
        return self._engine.compute(self._batch)


class FakeContext:
    """What a handler touches of TorchServe's context, and what it said through it."""

    def __init__(self, model_dir: str, yaml: dict[str, Any] | None = None, **properties: Any):
        self.model_name = "fake"
        self.manifest = {"model": {"modelVersion": "1.0"}}
        self.model_yaml_config = yaml
        self.system_properties = {"model_dir": model_dir, "gpu_id": None, **properties}
        self.statuses: dict[int, int] = {}
        self.content_types: dict[int, str] = {}
        self.request_headers: dict[int, dict[str, Any]] = {}
        self.response_headers: dict[int, dict[str, str]] = {}
        #: Name, value, unit, kind and labels.
        self.emitted: list[tuple[str, float, str, str, dict[str, str]]] = []
        self.metrics = self
        self.asked = False

    def get_all_request_header(self, idx: int) -> dict[str, Any]:
        self.asked = True
        return self.request_headers.get(idx, {"Host": "x", "body": {"content-type": ""}})

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.response_headers.setdefault(idx, {})[key] = value

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        assert phrase
        self.statuses[idx] = code

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.content_types[idx] = value

    def add_metric(
        self,
        name: str,
        value: float,
        unit: str,
        idx: int | None,
        dimensions: list,
        metric_type: Any,
    ) -> None:
        # While a model loads TorchServe keeps no requests by their index.
        assert idx == (0 if self.asked else None)
        labels = {dimension.name: dimension.value for dimension in dimensions}
        assert labels.pop("ModelName") == self.model_name
        assert labels.pop("Level") == "Model"
        self.emitted.append((name, value, unit, metric_type.value, labels))
