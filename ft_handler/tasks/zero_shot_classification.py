"""A text scored against labels that the request brings, as transformers 4.57's pipeline does.

A model of natural language inference judges, for each label, whether the text entails a sentence
about it. Each is a pair with the text, one sequence; the text is read once.
"""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, cast

import numpy as np
from pydantic import AfterValidator, BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

from ft_handler.config import Flag, Settings, Whole, setting
from ft_handler.errors import ConfigError, MalformedRequest, ModelError, UnusableRequest
from ft_handler.tasks.base import Alias, Body, Column, Head, Loaded, Runner, Task
from ft_handler.tasks.pairs import Strategy, kept
from ft_handler.tasks.scores import sigmoid, softmax
from ft_handler.tasks.sequence_classification import TASK as CLASSIFICATION
from ft_handler.types import Encoding, Floats, Ids, Item, Outputs, Prediction

logger = logging.getLogger(__name__)

_SEPARATOR = ","


def _around(template: str) -> tuple[str, str]:
    """What stands before and behind the place for a label in a template.

    Raises ValueError for one without a place or with several, which a client could make endless.
    """
    try:
        parsed = [*string.Formatter().parse(template)]
    except ValueError:
        raise ValueError("must double every brace that is not of '{}'") from None
    places = [field for field in parsed if field[1] is not None]
    if len(places) != 1:
        raise ValueError("must hold '{}' once, where the label goes")
    # Anything else would let a client look into the label as an object, or widen it.
    _, name, form, conversion = places[0]
    if name not in ("", "0") or form or conversion:
        raise ValueError("may hold nothing in its braces: '{}' is where the label goes")
    at = parsed.index(places[0]) + 1
    before, behind = ("".join(text for text, *_ in part) for part in (parsed[:at], parsed[at:]))
    return before, behind


def _template(value: str) -> str:
    _around(value)
    return value


def _labels(value: object) -> object:
    """Of a setting: a list, or text with commas."""
    if isinstance(value, str):
        value = [label.strip() for label in value.split(_SEPARATOR)]
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("must be a list of labels")
    if not all(isinstance(label, str) and label.strip() for label in value):
        raise ValueError("must be a list of strings, none of them empty")
    return tuple(value)


Template = Annotated[str, AfterValidator(_template)]


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class Parameters:
    """What a text is scored against, and how.

    hypothesis_template  the sentence of a label, with `{}` for it
    multi_label          each label is judged by itself; else their scores sum to 1
    truncation           false refuses too long a text; else it is cut, never a label
    """

    candidate_labels: tuple[str, ...] | None = None
    hypothesis_template: Template = "This example is {}."
    multi_label: bool = False
    truncation: bool = True


class ZeroShotSettings(Settings):
    """Defaults of the parameters, and how many labels there may be."""

    candidate_labels: Annotated[tuple[str, ...] | None, BeforeValidator(_labels)] = setting(
        None,
        "The labels of requests that bring none: a list, or text with commas between them; null "
        "has every request bring its own.",
    )
    hypothesis_template: Template = setting(
        "This example is {}.",
        "The sentence that is made of a label, which goes where `{}` is. A request may override "
        "it.",
    )
    multi_label: Flag = setting(
        False,
        "Judge each label by itself; false makes the scores of all labels sum to 1. A request may "
        "override it.",
    )
    truncation: Flag = setting(
        True,
        "Texts that leave a label no room in `max_length`: true cuts them and says so in the "
        'answer (`"truncated": true`), false answers 422. Labels are never cut. A request may '
        "override it.",
    )
    max_labels: Whole = setting(100, "Most labels of one text; more answers 413.", 1)


@plain_dataclass(slots=True)
class LabelledText:
    """A text, and the labels it is scored against."""

    text: str
    labels: tuple[str, ...]
    params: Parameters

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, and a sentence a label."""
        return (self.text, *self.hypotheses())

    def hypotheses(self) -> Iterator[str]:
        """A sentence a label."""
        before, behind = _around(self.params.hypothesis_template)
        return (f"{before}{label}{behind}" for label in self.labels)


class ZeroShotRunner(Runner[LabelledText, Parameters, Encoding[LabelledText]]):
    """A text to a sequence a label; logits `[pairs, outputs]` to sorted labels."""

    def __init__(self, settings: ZeroShotSettings, loaded: Loaded) -> None:
        if len(loaded.labels) < 2:
            raise ConfigError(_no_inference("the traced file"))
        self.defaults = Parameters(
            candidate_labels=settings.candidate_labels,
            hypothesis_template=settings.hypothesis_template,
            multi_label=settings.multi_label,
            truncation=settings.truncation,
        )
        self.longest, self.most_texts = loaded.max_length, settings.max_labels
        self._reader, self._template = loaded.reader, loaded.template
        names = [loaded.labels[i].lower() for i in range(len(loaded.labels))]
        found = [i for i, name in enumerate(names) if name.startswith("entail")]
        if not found:
            logger.warning(
                "no label of the model begins with 'entail': its last output is taken for "
                "entailment; --labels at ft-handler trace, or index_to_name.json, names them"
            )
        self._entailment = found[0] if found else len(names) - 1
        # The other end, as transformers has it.
        self._contradiction = len(names) - 1 if self._entailment == 0 else 0
        if self.longest <= self._template.pair_specials:
            raise ConfigError(f"setting 'max_length' ({self.longest}) leaves no room for text")

    def encode(self, items: Sequence[Item[LabelledText]]) -> list[Encoding[LabelledText]]:
        """A sequence a label; an item whose labels leave its text no room is refused."""
        ids = iter(self._reader.ids([*chain.from_iterable(item.input.texts for item in items)]))
        out: list[Encoding[LabelledText]] = []
        for item in items:
            text = next(ids)
            hypotheses = [*islice(ids, len(item.input.labels))]
            try:
                out.append(self._pairs(item, text, hypotheses))
            except UnusableRequest as error:
                item.result = error
        return out

    def _pairs(
        self, item: Item[LabelledText], text: Ids, hypotheses: Sequence[Ids]
    ) -> Encoding[LabelledText]:
        room = self.longest - self._template.pair_specials
        cuts = item.input.params.truncation
        encoding = Encoding(item, [], [], False)
        for place, hypothesis in enumerate(hypotheses):
            keep = len(text)
            if keep + len(hypothesis) > room:
                if cuts and len(hypothesis) >= room:
                    raise UnusableRequest(
                        f"label {place} makes a sentence of {len(hypothesis)} tokens, which leaves "
                        f"the text none of {self.longest}"
                    )
                strategy: Strategy = "only_first" if cuts else False
                keep, _ = kept(keep, len(hypothesis), room, self.longest, strategy)
                encoding.truncated = True
            sequence, split = self._template.pair(text[:keep], hypothesis)
            encoding.sequences.append(sequence)
            encoding.splits.append(split)
        return encoding

    def predict(
        self, encodings: Sequence[Encoding[LabelledText]], outputs: Outputs
    ) -> list[Prediction]:
        """`{"sequence", "labels", "scores"}`, the best label first."""
        predictions: list[Prediction] = []
        begin = 0
        for encoding in encodings:
            end = begin + len(encoding.sequences)
            predictions.append(self._sorted(encoding.item.input, outputs.values[begin:end]))
            begin = end
        return predictions

    def _sorted(self, asked: LabelledText, logits: Floats) -> Prediction:
        merits = logits[:, self._entailment]
        alone = asked.params.multi_label or len(asked.labels) == 1
        if alone:
            merits = merits - logits[:, self._contradiction]
        # Scores may be equal where these are not.
        order = np.argsort(-merits, kind="stable")
        scores = (sigmoid(merits) if alone else softmax(merits))[order]
        return {
            "sequence": asked.text,
            "labels": [asked.labels[i] for i in order.tolist()],
            "scores": scores.tolist(),
        }


def _no_inference(what: str) -> str:
    return (
        f"zero-shot classification needs outputs for entailment and contradiction: {what} has one"
    )


class _LabelList:
    """What clients of Hugging Face expect of one text: an object a label."""

    many = False

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The labels of the one prediction, each with its score."""
        (prediction,) = cast("Sequence[dict[str, Any]]", predictions)
        flag = {k: v for k, v in prediction.items() if k not in ("sequence", "labels", "scores")}
        return [
            {"label": label, "score": score, **flag}
            for label, score in zip(prediction["labels"], prediction["scores"], strict=True)
        ]


class ZeroShotClassification(
    Task[LabelledText, Parameters, Encoding[LabelledText], ZeroShotSettings]
):
    """Labels of the client's own choice for a text."""

    name = "zero_shot_classification"
    auto_class = CLASSIFICATION.auto_class
    per_token = False
    labelled = True
    required = ("text",)
    bare = "text"
    lists = ("candidate_labels",)
    separator = _SEPARATOR
    textual = ("candidate_labels", "hypothesis_template")
    parameters = Parameters
    aliases: ClassVar[Mapping[str, Alias]] = {"multi_class": Alias("multi_label")}
    settings = ZeroShotSettings
    columns_of: ClassVar[Mapping[str, Column]] = {
        "labels": Column("BYTES", "", vector=True),
        "scores": Column("FP32", 0.0, vector=True),
    }
    measured_as = "candidates"
    sample: ClassVar[Mapping[str, object]] = {
        "text": "The town library opens at nine in the morning and closes at six.",
        "candidate_labels": ["opening hours", "sports"],
    }

    def head(self) -> Head:
        """That of sequence classification, trained on natural language inference."""
        return CLASSIFICATION.head()

    def columns(self, config: Any) -> int:
        """The outputs of inference; raises ModelError for a checkpoint with one."""
        if config.num_labels < 2:
            raise ModelError(_no_inference("this checkpoint"))
        return super().columns(config)

    def read(self, texts: Mapping[str, Any], params: Parameters) -> LabelledText:
        """A text with its own labels, else those of the settings."""
        if params.candidate_labels is None:
            raise MalformedRequest("the request has no 'candidate_labels'")
        return LabelledText(texts["text"], params.candidate_labels, params)

    def foreign(self, document: Mapping[str, object]) -> Body | None:
        """One text in `inputs`, as clients of Hugging Face ask."""
        if not isinstance(document.get("inputs"), str):
            return None
        rest = {key: value for key, value in document.items() if key != "inputs"}
        return Body([document["inputs"]], rest, _LabelList())

    def spread(self, document: Mapping[str, object]) -> list[dict[str, object]] | None:
        """A list of texts with the same labels."""
        texts = document.get("text")
        if not isinstance(texts, list):
            return None
        return [{**document, "text": text} for text in texts]

    def runner(self, settings: ZeroShotSettings, loaded: Loaded) -> ZeroShotRunner:
        """Pairs of at most `max_length` tokens."""
        return ZeroShotRunner(settings, loaded)

    def sample_text(self) -> str:
        """The sample with its labels, which a text alone would lack."""
        return json.dumps(self.sample)


TASK = ZeroShotClassification()
