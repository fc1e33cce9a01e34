"""The request path, stage by stage; runs without TorchServe.

dicts -decode-> Request -tokenize-> Encoding -bucket and pack-> PackedBatch -engine-> logits
 -postprocess-> Prediction -encode-> Reply

A request that fails leaves the flow with its own answer; its neighbours go on.

Where the engine computes beside the host, a large batch goes in parts: while the device works on
one, the next is tokenized and launched, and then the answers of those that are done are made.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ft_handler.config import HandlerConfig
from ft_handler.engine.base import Engine, Logits, Pending
from ft_handler.errors import (
    ConfigError,
    EngineLost,
    InternalError,
    OutOfDeviceMemory,
    OutOfMemory,
    RequestError,
)
from ft_handler.request.batching import (
    Indices,
    Sequences,
    default_buckets,
    flatten,
    pack,
    plan_buckets,
    restore_rows,
    restore_tokens,
)
from ft_handler.request.codec import Codec, encode_error
from ft_handler.tasks.encoders import QuestionEncoder, TextEncoder
from ft_handler.tasks.question_answering import QuestionAnswering
from ft_handler.tasks.sequence_classification import Classification
from ft_handler.types import (
    ClassificationParams,
    Encoding,
    ModelInput,
    PackedBatch,
    Prediction,
    QuestionParams,
    Reply,
    Request,
    TextInput,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ft_handler.model.info import ModelInfo

logger = logging.getLogger(__name__)

STAGES = ("decode", "tokenize", "pack", "compute", "postprocess", "encode")


@dataclass(slots=True)
class BatchStats:
    """What one batch was and what it cost.

    padded        tokens that padding every sequence to the longest one would have added
    padded_fixed  the same for padding to the longest allowed length
    seconds       the host's wall time in each of `STAGES`; "compute" is launching and waiting for
                  the engine, so a device's work that other stages hide is not in it
    """

    requests: int = 0
    sequences: int = 0
    tokens: int = 0
    padded: int = 0
    padded_fixed: int = 0
    buckets: int = 0
    refused: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


@dataclass(slots=True)
class _Part:
    """Requests that are under way together."""

    requests: dict[int, Request]
    encodings: list[Encoding]
    sequences: Sequences
    waiting: list[tuple[Indices, Pending | Exception]]
    buckets: int = 0


#: A batch on its way through an engine that overlaps goes in at most so many parts, of at least
#: so many characters (2,500 tokens of English): smaller launches would use a GPU badly.
_MOST_PARTS = 3
_LEAST_PART = 12_000


def _characters(item: ModelInput) -> int:
    if isinstance(item, TextInput):
        return len(item.text) + len(item.text_pair or "")
    return len(item.question) + len(item.context)


_Lap = Callable[[str], None]


def _laps(clock: Callable[[], float], seconds: dict[str, float]) -> _Lap:
    """A stopwatch: every call adds the time since the last one to a stage."""
    last = clock()

    def lap(stage: str) -> None:
        nonlocal last
        now = clock()
        seconds[stage] += now - last
        last = now

    return lap


def _ignore(_: BatchStats) -> None:
    """The observer of a pipeline that nobody watches."""


class Pipeline:
    """Chains the stages for one model.

    config         settings; contradictions with the model raise ConfigError
    info           the traced file's description of itself
    tokenizer      without truncation or padding
    engine         encoder and head
    labels         names of the classes; None takes the traced file's
    model_name, model_version   for Open Inference Protocol answers
    observe        gets the figures of every batch
    clock          seconds, for those figures
    """

    def __init__(
        self,
        config: HandlerConfig,
        info: ModelInfo,
        tokenizer: Tokenizer,
        engine: Engine,
        *,
        labels: Mapping[int, str] | None = None,
        model_name: str = "model",
        model_version: str | None = None,
        observe: Callable[[BatchStats], None] = _ignore,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _check(config, info, tokenizer)
        self._engine = engine
        self._observe = observe
        self._clock = clock
        self._max_batch_tokens = config.max_batch_tokens
        edges = config.length_buckets
        self._edges = default_buckets(info.max_positions) if edges is None else edges
        max_length = config.max_length or info.max_positions
        self._question = info.mode == "question_answering"
        self._encoder: TextEncoder | QuestionEncoder
        self._task: Classification | QuestionAnswering
        defaults: ClassificationParams | QuestionParams
        if self._question:
            defaults = QuestionParams(
                config.top_k or 1,
                config.doc_stride,
                config.max_answer_len,
                config.max_seq_len or min(max_length, 384),
                config.max_question_len,
                config.handle_impossible_answer,
                config.align_to_words,
            )
            self._longest = defaults.max_seq_len
            self._encoder = QuestionEncoder(tokenizer, max_length)
            self._task = QuestionAnswering()
        else:
            defaults = ClassificationParams(
                config.top_k, config.function_to_apply, config.truncation
            )
            self._longest = max_length
            self._encoder = TextEncoder(tokenizer, max_length)
            self._task = Classification(labels or info.labels, info.problem_type)
        self._codec = Codec(info.mode, defaults, config, model_name, model_version)

    def run(self, data: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """One reply a request, in order. Raises EngineLost when the worker has to be restarted."""
        stats = BatchStats(requests=len(data))
        replies: list[Reply | None] = [None] * len(data)
        lap = _laps(self._clock, stats.seconds)
        requests = self._decode(data, replies)
        lap("decode")
        parts = [self._start(part, replies, lap) for part in self._parts(requests)]
        for part in parts:
            self._finish(part, replies, lap)
        lengths = np.concatenate([part.sequences.lengths for part in parts])
        if len(lengths):
            stats.sequences = len(lengths)
            stats.tokens = int(lengths.sum())
            stats.padded = stats.sequences * int(lengths.max()) - stats.tokens
            # A request may ask for longer windows than the default.
            stats.padded_fixed = max(0, stats.sequences * self._longest - stats.tokens)
            stats.buckets = sum(part.buckets for part in parts)
        out = [reply for reply in replies if reply is not None]
        assert len(out) == len(data)
        for reply in out:
            stats.failed += reply.status >= 500
            stats.refused += 400 <= reply.status < 500
        self._observe(stats)
        return out

    def _decode(
        self, data: Sequence[Mapping[str, Any]], replies: list[Reply | None]
    ) -> dict[int, Request]:
        """The requests that can be understood; the others get their reply."""
        requests: dict[int, Request] = {}
        for index, item in enumerate(data):
            try:
                requests[index] = self._codec.decode(item)
            except RequestError as error:
                replies[index] = encode_error(error)
            except Exception as error:
                replies[index] = _internal("decode", error)
        return requests

    def _parts(self, requests: dict[int, Request]) -> list[dict[int, Request]]:
        """Neighbouring requests in parts of similar size, each worth a launch of its own."""
        if not self._engine.overlaps:
            return [requests]
        sizes = [sum(map(_characters, request.inputs)) for request in requests.values()]
        total = sum(sizes)
        count = min(_MOST_PARTS, total // _LEAST_PART)
        if count < 2:
            return [requests]
        parts: list[dict[int, Request]] = [{} for _ in range(count)]
        before = 0
        for (index, request), size in zip(requests.items(), sizes, strict=True):
            parts[before * count // total][index] = request
            before += size
        return [part for part in parts if part]

    def _start(self, requests: dict[int, Request], replies: list[Reply | None], lap: _Lap) -> _Part:
        """Tokenize, pack and launch requests."""
        encodings = self._tokenize(requests, replies)
        lap("tokenize")
        sequences = flatten(encodings)
        plan = plan_buckets(sequences.lengths, self._edges, self._max_batch_tokens)
        batches = [(members, pack(sequences, members)) for members in plan]
        lap("pack")
        waiting = [(members, self._launch(batch)) for members, batch in batches]
        lap("compute")
        return _Part(requests, encodings, sequences, waiting)

    def _finish(self, part: _Part, replies: list[Reply | None], lap: _Lap) -> None:
        """Wait for a part's logits and reply to its requests."""
        done, lost = self._collect(part.sequences, part.waiting)
        part.buckets = len(done)
        lap("compute")
        inputs = [i for request in part.requests.values() for i in request.inputs]
        predictions: list[Prediction | RequestError] = []
        if inputs:
            predictions = self._predict(inputs, part.encodings, part.sequences, done, lost)
        lap("postprocess")
        at = 0
        for index, request in part.requests.items():
            mine = predictions[at : at + len(request.inputs)]
            at += len(request.inputs)
            try:
                answers = []
                for prediction in mine:
                    if isinstance(prediction, RequestError):
                        raise prediction
                    answers.append(prediction)
                replies[index] = self._codec.encode(request, answers)
            except RequestError as error:
                replies[index] = encode_error(error)
            except Exception as error:
                replies[index] = _internal("encode", error)
        lap("encode")

    def _tokenize(
        self, requests: dict[int, Request], replies: list[Reply | None]
    ) -> list[Encoding]:
        """Encodings of all inputs; requests with an input that has none leave `requests`."""
        inputs = [i for request in requests.values() for i in request.inputs]
        if not inputs:
            return []
        encoded: list[Encoding | RequestError] = []
        try:
            encoded = self._encoder.encode(inputs)
        except Exception as error:
            _log("tokenize", error)
            # One input at a time, so that only the culprit suffers.
            for item in inputs:
                try:
                    encoded += self._encoder.encode([item])
                except Exception:
                    encoded.append(InternalError())
        if not any(isinstance(e, RequestError) for e in encoded):
            return encoded  # type: ignore[return-value]
        kept: list[Encoding] = []
        at = 0
        for index, request in list(requests.items()):
            mine = encoded[at : at + len(request.inputs)]
            at += len(request.inputs)
            good: list[Encoding] = []
            for position, encoding in enumerate(mine):
                if isinstance(encoding, RequestError):
                    if request.form != "single" and not isinstance(encoding, InternalError):
                        encoding = type(encoding)(f"inputs[{position}]: {encoding}")
                    replies[index] = encode_error(encoding)
                    del requests[index]
                    break
                good.append(encoding)
            else:
                kept += good
        return kept

    def _collect(
        self, sequences: Sequences, waiting: list[tuple[Indices, Pending | Exception]]
    ) -> tuple[list[tuple[Indices, Logits]], list[tuple[Indices, RequestError]]]:
        """Wait for every bucket in turn: results by bucket, and buckets that failed."""
        done: list[tuple[Indices, Logits]] = []
        lost: list[tuple[Indices, RequestError]] = []
        while waiting:
            members, pending = waiting.pop(0)
            try:
                if isinstance(pending, Exception):
                    raise pending
                done.append((members, pending.result()))
            except EngineLost:
                raise
            except Exception as error:
                if not _out_of_memory(error):
                    lost.append((members, InternalError()))
                    _log("compute", error, with_message=True)
                elif len(members) == 1:
                    lost.append((members, OutOfMemory()))
                    logger.error("one sequence does not fit into memory")
                else:
                    half = len(members) // 2
                    logger.warning("out of memory with %d sequences: halved", len(members))
                    for part in (members[:half], members[half:]):
                        waiting.insert(0, (part, self._launch(pack(sequences, part))))
        return done, lost

    def _launch(self, batch: PackedBatch) -> Pending | Exception:
        try:
            return self._engine.launch(batch)
        except EngineLost:
            raise
        except Exception as error:
            return error

    def _predict(
        self,
        inputs: Sequence[ModelInput],
        encodings: Sequence[Encoding],
        sequences: Sequences,
        done: Sequence[tuple[Indices, Logits]],
        lost: Sequence[tuple[Indices, RequestError]],
    ) -> list[Prediction | RequestError]:
        """One prediction an input, or the error that takes its place."""
        if not done:
            return [lost[0][1]] * len(inputs)
        count = len(sequences.lengths)
        bad: NDArray[np.bool_] | np.bool_
        predictions: list[Prediction | RequestError]
        try:
            if isinstance(self._task, QuestionAnswering):
                start, end = (
                    restore_tokens([(m, r[side]) for m, r in done], sequences.lengths)
                    for side in (0, 1)
                )
                begins = np.cumsum(sequences.lengths) - sequences.lengths
                bad = np.logical_not(np.logical_and.reduceat(np.isfinite(start + end), begins))
                if bad.any():
                    start, end = np.nan_to_num(start), np.nan_to_num(end)
                predictions = list(self._task.predict(inputs, encodings, start, end))
            else:
                logits = restore_rows([(m, r[0]) for m, r in done], count)
                bad = np.logical_not(np.isfinite(logits).all(axis=1))
                predictions = list(self._task.predict(inputs, encodings, logits))
        except Exception as error:
            _log("postprocess", error)
            return [InternalError()] * len(inputs)
        if not lost and not bad.any():
            return predictions
        if bad.any():
            logger.error("the model gave no finite logits for %d sequences", int(bad.sum()))
        errors: dict[int, RequestError] = {int(i): InternalError() for i in np.flatnonzero(bad)}
        for members, failure in lost:
            errors.update(dict.fromkeys(members.tolist(), failure))
        at = 0
        for i, encoding in enumerate(encodings):
            for sequence in range(at, at + len(encoding.sequences)):
                if sequence in errors:
                    predictions[i] = errors[sequence]
            at += len(encoding.sequences)
        return predictions


def _check(config: HandlerConfig, info: ModelInfo, tokenizer: Tokenizer) -> None:
    """Refuse settings that the model contradicts."""
    if config.mode is not None and config.mode != info.mode:
        raise ConfigError(
            f"setting 'mode' is {config.mode}, but the traced file is for {info.mode}"
        )
    if info.mode == "sequence_classification":
        if config.num_labels is not None and config.num_labels != info.num_labels:
            raise ConfigError(
                f"setting 'num_labels' is {config.num_labels}, but the traced file has "
                f"{info.num_labels}"
            )
        for name in ("doc_stride", "max_seq_len"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"setting '{name}' is for question_answering, but the traced file is for "
                    "sequence_classification"
                )
    elif config.function_to_apply is not None:
        raise ConfigError(
            "setting 'function_to_apply' is for sequence_classification, but the traced file is "
            "for question_answering"
        )
    for name in ("max_length", "max_seq_len"):
        value = getattr(config, name)
        if value is not None and value > info.max_positions:
            raise ConfigError(
                f"setting '{name}' is {value}, but the model has {info.max_positions} positions"
            )
    if tokenizer.get_vocab_size() > info.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, but the traced file was made "
            f"for {info.vocab_size}: they do not belong together"
        )


def _out_of_memory(error: Exception) -> bool:
    # Torch's CPU allocator raises a plain RuntimeError, and so does what wraps std::bad_alloc.
    return isinstance(error, (OutOfDeviceMemory, MemoryError)) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "bad_alloc" in str(error))
    )


def _log(stage: str, error: Exception, *, with_message: bool = False) -> None:
    """Log a failure of ours; messages only of stages that never see the client's text."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    message = f": {error}" if with_message else ""
    logger.error("%s failed: %s%s\n%s", stage, type(error).__name__, message, frames)


def _internal(stage: str, error: Exception) -> Reply:
    _log(stage, error)
    return encode_error(InternalError())
