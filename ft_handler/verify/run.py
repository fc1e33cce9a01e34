"""`ft-handler verify`: a traced file and transformers' model over the same examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from ft_handler.config import RawSettings, model_yaml
from ft_handler.errors import ConfigError, DataError, EngineError, ModelError, RequestError
from ft_handler.model.info import ModelInfo
from ft_handler.prepare.checkpoint import Checkpoint, load_checkpoint
from ft_handler.prepare.compare import Reference
from ft_handler.request.batching import flatten
from ft_handler.request.documents import Decoder, Limits
from ft_handler.runtime import Ready, open_model
from ft_handler.servers import server_settings
from ft_handler.types import Encoding, Floats, Incoming, Item, Outputs, Prediction
from ft_handler.verify.data import Example, Layout, read_examples
from ft_handler.verify.measures import Measure, Subject, measure_of
from ft_handler.verify.sides import Side, Traced, Transformers

#: The largest packed batch; the engine's own memory is planned for the settings' number.
MOST_TOKENS = 16384
_MOST_CHARS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to verify, with what; the command line's options one for one.

    checkpoint      None takes what the traced file records
    labels          names of the model's outputs as the file has them, or the candidates of a model
                    that is asked about any; None: the model's own, or the file's
    tolerance       points that a metric may be below transformers'
    most_different  answers that may differ: a number, or with % a share of all
    """

    source: Path
    data: Path
    checkpoint: str | None = None
    adapter: Path | None = None
    cache_dir: str | None = None
    layout: Layout = field(default_factory=Layout)
    labels: Sequence[str] | None = None
    limit: int | None = None
    batch_size: int = 16
    device: str = "auto"
    tolerance: float = 0.5
    most_different: str = "1%"


@dataclass(frozen=True)
class Figures:
    """One side's: metrics in points, tokens that it computed, pads included, and its seconds."""

    metrics: dict[str, float]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What was found.

    examples   that both sides answered
    refused    that no server would answer, such as an empty text
    different  answers that are not the same
    agreement  how near the answers are beside that, as the measure has it
    largest_difference, mean_difference  of the outputs, logits mostly
    failures   why the file is not good enough; empty where it is
    """

    file: str
    checkpoint: str
    task: str
    data_type: str
    device: str
    examples: int
    refused: int
    traced: Figures
    transformers: Figures
    different: int
    agreement: dict[str, float]
    largest_difference: float
    mean_difference: float
    failures: list[str]

    def document(self) -> dict[str, Any]:
        """The report, ready for JSON."""
        return {**asdict(self), "passed": not self.failures}


def verify(
    options: VerifyOptions,
    say: Callable[[str], None] = lambda _: None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Answer every example on both sides and compare.

    say      hears one line a step
    advance  hears how many examples of how many are done

    Raises DataError, ModelError, ConfigError or EngineError in words.
    """
    allowed = _allowed(options.most_different)
    ready = open_settled(options)
    found = read_examples(options.data, options.layout, options.limit)
    subject = Subject(ready.info, found, options.labels, ready.runner.defaults)
    measure = measure_of(ready.task)(subject)
    examples = measure.examples
    labelled = [example.gold is not None for example in examples]
    if any(labelled) and not all(labelled):
        raise DataError(
            f"{options.data}: {examples[labelled.index(False)].place} has no answer, others have"
        )
    golds = [measure.gold(example) for example in examples] if all(labelled) else None
    say(f"{options.data}: {len(examples)} examples{' without answers' if golds is None else ''}")
    name = named(options, ready.info)
    say(f"loading {name}")
    checkpoint = load_checkpoint(
        ready.info.mode,
        name,
        cache_dir=options.cache_dir,
        adapter=options.adapter,
        labels=[ready.info.labels[i] for i in range(len(ready.info.labels))] or None,
        wishes=ready.info.chosen,
    )
    for note in (*checkpoint.notes, *checkpoint.doubts):
        say(f"note: {note}")
    hold(checkpoint, ready.info)
    ours, theirs = sides(ready, checkpoint)
    groups = encoded(ready, measure, examples)
    if not groups:
        raise DataError(f"{options.data}: no example can be answered")
    compared = Comparison(ready)
    order = sorted(groups, key=lambda number: -longest(groups[number]))
    for at in range(0, len(order), options.batch_size):
        chosen = order[at : at + options.batch_size]
        compared.add({number: groups[number] for number in chosen}, ours, theirs)
        advance(at + len(chosen), len(order))
    first, second = ([side[number] for number in groups] for side in compared.predictions)
    same = [measure.same(a, b) for a, b in zip(first, second, strict=True)]
    answered = None if golds is None else [golds[number] for number in groups]
    figures = [
        Figures(measure.metrics(answered, found) if answered else {}, side.tokens, side.seconds)
        for side, found in ((ours, first), (theirs, second))
    ]
    return Report(
        file=str(options.source),
        checkpoint=name,
        task=ready.task.name,
        data_type=ready.info.data_type,
        device=str(ready.device),
        examples=len(groups),
        refused=len(examples) - len(groups),
        traced=figures[0],
        transformers=figures[1],
        different=same.count(False),
        agreement=measure.agreement(first, second),
        largest_difference=compared.largest,
        mean_difference=compared.total / compared.count,
        failures=failures(figures[0], figures[1], same, options.tolerance, allowed),
    )


def open_settled(options: VerifyOptions) -> Ready:
    """The traced file under its folder's settings, on the wanted device."""
    if not options.source.exists():
        raise ConfigError(f"{options.source}: no such folder or file; `ft-handler trace` makes one")
    raw = RawSettings.of_model_dir(options.source, model_yaml(options.source))
    given = {"device": options.device, "warmup": False}
    return open_model(options.source, raw.over(given), groups=server_settings(), gpu=0)


def named(options: VerifyOptions, info: ModelInfo) -> str:
    """The checkpoint's name; raises ConfigError where neither the user nor the file says it."""
    name = options.checkpoint or info.checkpoint
    if name is None:
        raise ConfigError(
            f"{options.source} does not say what it was traced from: --checkpoint names it, a hub "
            "name or a folder"
        )
    if info.adapter is not None and options.adapter is None:
        raise ConfigError(
            f"{options.source} was traced with an adapter, from a folder {info.adapter!r}: "
            "--adapter says where that is"
        )
    return name


def hold(checkpoint: Checkpoint, info: ModelInfo) -> None:
    """Refuse a checkpoint of another shape than the file's; raises ModelError."""
    spec = checkpoint.architecture.spec(checkpoint.config)
    found = {
        "architecture": checkpoint.architecture.model_type,
        "hidden_size": spec.hidden_size,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "vocab_size": checkpoint.config.vocab_size,
    }
    for name, value in found.items():
        if getattr(info, name) != value:
            raise ModelError(
                f"the checkpoint has {name} {value}, the traced file {getattr(info, name)}: it "
                "was traced from another one"
            )


def sides(ready: Ready, checkpoint: Checkpoint) -> tuple[Side, Side]:
    """The traced file's and transformers'."""
    token_types = checkpoint.architecture.token_types(checkpoint.config)
    per_token = ready.task.per_token
    # Some models count positions by which ids are not the pad's.
    pad = checkpoint.architecture.pad(checkpoint.config) or 0
    expected = checkpoint.architecture.head(checkpoint.tailored.task).expected
    reference = Reference(checkpoint.model.to(ready.device), token_types > 0, expected).eval()
    return (
        Traced(ready.engine, per_token, ready.info.max_positions, MOST_TOKENS),
        Transformers(reference, per_token, ready.device, pad, MOST_TOKENS),
    )


def encoded(
    ready: Ready, measure: Measure, examples: Sequence[Example]
) -> dict[int, list[Encoding[Any]]]:
    """The sequences of what is asked about each example, by its number, but of refused ones.

    Raises DataError where every example is refused, with the first reason.
    """
    limits = Limits(1, _MOST_CHARS, ready.runner.most_texts)
    decoder = Decoder(ready.task, ready.runner.defaults, limits, {})
    items: list[Item[Any]] = []
    refused: dict[int, RequestError] = {}
    for number, example in enumerate(examples):
        try:
            for position, body in enumerate(measure.requests(example)):
                items.append(Item(number, position, decoder.decode(Incoming(body)).inputs[0]))
        except RequestError as error:
            refused[number] = error
    encodings = [] if not items else ready.runner.encode(items)
    for item in items:
        if isinstance(item.result, RequestError):
            refused.setdefault(item.request, item.result)
    kept: dict[int, list[Encoding[Any]]] = {}
    for encoding in encodings:
        if encoding.item.request not in refused:
            kept.setdefault(encoding.item.request, []).append(encoding)
    if not kept and refused:
        raise DataError(
            f"no example can be answered by a {ready.task.name} model: {refused[min(refused)]}"
        )
    return kept


def longest(encodings: Sequence[Encoding[Any]]) -> int:
    """Tokens of the longest sequence."""
    return max(len(ids) for encoding in encodings for ids in encoding.sequences)


class Comparison:
    """Outputs and answers of both sides, batch by batch.

    predictions     of each side, by the number of their example
    largest, total  of all differences between outputs, and their `count`
    """

    def __init__(self, ready: Ready) -> None:
        self.predictions: tuple[dict[int, Prediction], dict[int, Prediction]] = ({}, {})
        self.largest = self.total = 0.0
        self.count = 0
        self._runner = ready.runner

    def add(self, groups: Mapping[int, Sequence[Encoding[Any]]], ours: Side, theirs: Side) -> None:
        """Compute one batch on both sides, by the examples' numbers.

        Raises EngineError for outputs that are no numbers.
        """
        encodings = [*chain.from_iterable(groups.values())]
        sequences = flatten(encodings)
        values: list[Floats] = []
        for side, predictions in zip((ours, theirs), self.predictions, strict=True):
            values.append(side.outputs(sequences))
            if not np.isfinite(values[-1]).all():
                whose = "the traced file's" if side is ours else "transformers'"
                raise EngineError(f"{whose} outputs are not finite")
            answers = iter(self._runner.predict(encodings, Outputs(values[-1], sequences.lengths)))
            for number, group in groups.items():
                predictions[number] = _joined([*islice(answers, len(group))])
        apart = np.abs(values[0] - values[1])
        self.largest = max(self.largest, float(apart.max()))
        self.total += float(apart.sum(dtype=np.float64))
        self.count += apart.size


def _joined(predictions: list[Prediction]) -> Prediction:
    """The answer to an example that is one request, or the list of those to several."""
    return predictions[0] if len(predictions) == 1 else cast("Prediction", predictions)


def failures(
    ours: Figures, theirs: Figures, same: Sequence[bool], tolerance: float, allowed: _Bound
) -> list[str]:
    """What is worse than it may be, in words."""
    out = [
        f"{name} is {theirs.metrics[name] - value:.2f} points below transformers', "
        f"{tolerance:g} are allowed"
        for name, value in ours.metrics.items()
        if theirs.metrics[name] - value > tolerance
    ]
    different, most = same.count(False), allowed(len(same))
    if different > most:
        out.append(f"{different} answers differ, {most} are allowed")
    return out


_Bound = Callable[[int], int]


def _allowed(text: str) -> _Bound:
    """How many of so many answers `--most-different` lets differ; raises ConfigError."""
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
        if not 0 <= number < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--most-different is {text!r}, not a number or a share such as 1%"
        ) from None
    return lambda answers: int(answers * number / 100 if share else number)
