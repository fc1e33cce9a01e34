"""One text or a pair, scored against labels, as transformers' text-classification pipeline does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ft_handler.config import LARGEST_WHOLE, AnyCase, Flag, Settings, Whole, setting
from ft_handler.errors import ConfigError, RequestError, UnusableRequest
from ft_handler.tasks.base import Alias, AnyTask, Column, Head, Loaded, Runner, Task
from ft_handler.tasks.occlusion import (
    EXPLANATIONS,
    Explainable,
    Explained,
    OcclusionRunner,
    Part,
    Reason,
)
from ft_handler.tasks.pairs import Truncation, kept
from ft_handler.tasks.scores import sigmoid, softmax
from ft_handler.tasks.windows import default_overlap, even_spans, hold_windows
from ft_handler.types import Encoding, Floats, Ids, Item, Outputs, Prediction

#: `top_k` of a request that asks for every label: more than any model has.
ALL_LABELS = LARGEST_WHOLE

Function = Literal["softmax", "sigmoid", "none"]
LongTexts = Literal["truncate", "mean", "max"]


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class Parameters:
    """How one text is cut and scored.

    top_k              None gives the best label as an object, a number a list of so many
    function_to_apply  over the logits; None leaves the choice to the model
    truncation         what of too long an input may be cut
    max_length         most tokens; None, and whatever is more, is the model's setting
    long_texts         whether they are cut, or read in windows whose logits become one row
    stride             least tokens that windows share; None is a quarter of one, at most 128
    """

    top_k: Annotated[int, Field(ge=1, le=LARGEST_WHOLE)] | None = None
    function_to_apply: Annotated[Function | None, AnyCase] = None
    truncation: Truncation = True
    max_length: Annotated[int, Field(ge=1, le=LARGEST_WHOLE)] | None = None
    long_texts: Annotated[LongTexts, AnyCase] = "truncate"
    stride: Annotated[int, Field(ge=0, le=LARGEST_WHOLE)] | None = None


class ClassificationSettings(Settings):
    """Defaults of the parameters."""

    truncation: Flag = setting(
        True,
        "Inputs over `max_length`: true cuts them and says so in the answer "
        '(`"truncated": true`), false answers 422. A request may override it.',
    )
    function_to_apply: Annotated[Function | None, AnyCase] = setting(
        None,
        "`softmax`, `sigmoid` or `none` (a string) over the logits; null chooses by the model: "
        "what sentence-transformers configured where there is one label, else regression none, "
        "multi-label or one label sigmoid, else softmax. A request may override it.",
    )
    top_k: Whole | None = setting(
        None,
        "How many labels: null gives the best one as an object, a number a list sorted by score. "
        "A request may override it.",
        1,
    )
    long_texts: Annotated[LongTexts, AnyCase] = setting(
        "truncate",
        "Inputs over `max_length`: `truncate` does what `truncation` says; `mean` and `max` read "
        "them whole, in windows that overlap, and score each label by the mean or the largest of "
        "the windows' logits. A request may override it.",
    )
    stride: Whole | None = setting(
        None,
        "Least tokens that neighbouring windows share; null is a quarter of a window, at most "
        "128. A request may override it.",
        0,
    )


@plain_dataclass(slots=True)
class TextInput:
    """One text, or a pair, to classify."""

    text: str
    text_pair: str | None
    params: Parameters

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, and its pair where it has one."""
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)


@plain_dataclass(slots=True, eq=False)
class TextEncoding(Encoding[TextInput]):
    """The sequence of a text or a pair, or its windows.

    spans  of each sequence the tokens [begin, end) of each text that it has
    """

    spans: list[tuple[tuple[int, int], ...]]


def default_function(problem_type: str | None, num_labels: int) -> Function:
    """As transformers: regression none, multi-label or one label sigmoid, else softmax."""
    if problem_type == "regression":
        return "none"
    if problem_type == "multi_label_classification" or num_labels == 1:
        return "sigmoid"
    return "softmax"


def apply(function: Function, logits: Floats) -> Floats:
    """Scores of logits `[n, labels]`."""
    if function == "softmax":
        return softmax(logits)
    return sigmoid(logits) if function == "sigmoid" else logits


class ClassificationRunner(Explainable[TextInput, Parameters, TextEncoding]):
    """Texts to sequences of at most `max_length` tokens; logits `[inputs, labels]` to labels."""

    def __init__(self, settings: ClassificationSettings, loaded: Loaded) -> None:
        self.defaults = Parameters(
            settings.top_k,
            settings.function_to_apply,
            settings.truncation,
            long_texts=settings.long_texts,
            stride=settings.stride,
        )
        self.longest = loaded.max_length
        self._reader, self._template = loaded.reader, loaded.template
        self._labels = [loaded.labels[i] for i in range(len(loaded.labels))]
        self._function = loaded.info.function_to_apply or default_function(
            loaded.info.problem_type, len(self._labels)
        )
        if self.longest <= self._template.pair_specials:
            raise ConfigError(f"setting 'max_length' ({self.longest}) leaves no room for text")
        # Most tokens of a text that is no pair.
        specials = len(self._template.single_before) + len(self._template.single_after)
        self._room_alone = self.longest - specials
        if settings.stride is not None and settings.stride >= self._room_alone:
            raise ConfigError(
                f"setting 'stride' ({settings.stride}) leaves windows of {self._room_alone} "
                "tokens no way forward"
            )

    def encode(self, items: Sequence[Item[TextInput]]) -> list[TextEncoding]:
        """One sequence an item, or windows; too long a text without truncation is refused."""
        inputs = [item.input for item in items]
        firsts = self._reader.ids([i.text for i in inputs])
        pairs = [i.text_pair for i in inputs if i.text_pair is not None]
        seconds = iter(self._reader.ids(pairs) if pairs else ())
        out: list[TextEncoding] = []
        for item, first in zip(items, firsts, strict=True):
            try:
                if item.input.text_pair is None:
                    out.append(self._single(item, first))
                else:
                    out.append(self._pair(item, first, next(seconds)))
            except RequestError as error:
                item.result = error
        return out

    def _single(self, item: Item[TextInput], ids: Ids) -> TextEncoding:
        room = self._room_alone - self._less(item)
        over = len(ids) > room
        if over and item.input.params.long_texts != "truncate":
            beside = self.longest - self._room_alone
            spans = self._windows(item, len(ids), room, beside)
            parts = [self._template.alone(ids[begin:end]) for begin, end in spans]
            return TextEncoding(item, parts, [*map(len, parts)], False, [(s,) for s in spans])
        if over:
            self._check(item, len(ids), 0, room)
            ids = ids[:room]
        sequence = self._template.alone(ids)
        return TextEncoding(item, [sequence], [len(sequence)], over, [((0, len(ids)),)])

    def _pair(self, item: Item[TextInput], first: Ids, second: Ids) -> TextEncoding:
        template = self._template
        count = len(first) + len(second)
        room = self.longest - template.pair_specials - self._less(item)
        over = count > room
        if over and item.input.params.long_texts != "truncate":
            spans = self._pair_windows(item, len(first), len(second), room)
            pairs = [template.pair(first[a:b], second[c:d]) for (a, b), (c, d) in spans]
            parts, splits = zip(*pairs, strict=True)
            return TextEncoding(item, [*parts], [*splits], False, spans)
        if over:
            keep_first, keep_second = self._check(item, len(first), len(second), room)
            first, second = first[:keep_first], second[:keep_second]
        sequence, split = template.pair(first, second)
        whole = (0, len(first)), (0, len(second))
        return TextEncoding(item, [sequence], [split], over, [whole])

    def _windows(
        self, item: Item[TextInput], tokens: int, room: int, beside: int
    ) -> list[tuple[int, int]]:
        """Overlapping parts of `room` tokens of a text; raises UnusableRequest without a way.

        beside  tokens that a sequence has beside its part

        Raises RequestTooLarge where there are too many.
        """
        if room < 1:
            raise UnusableRequest("'max_length' leaves no room for text")
        stride = item.input.params.stride
        if stride is not None and stride >= room:
            raise UnusableRequest(
                f"the input needs several windows with room for {room} tokens, but 'stride' has "
                f"neighbours share {stride}"
            )
        overlap = default_overlap(room) if stride is None else stride
        hold_windows(tokens, room, overlap, beside, self.most_tokens, "stride")
        return even_spans(tokens, room, overlap)

    def _pair_windows(
        self, item: Item[TextInput], first: int, second: int, room: int
    ) -> list[tuple[tuple[int, int], ...]]:
        """The shorter text of a pair beside every part of the longer one."""
        shorter = min(first, second)
        if shorter > room // 2:
            raise UnusableRequest(
                f"the shorter text of the pair has {shorter} tokens; read in windows, it may have "
                f"{max(room, 0) // 2}, half of one"
            )
        room -= shorter
        beside = self._template.pair_specials + shorter
        if first > second:
            return [(part, (0, second)) for part in self._windows(item, first, room, beside)]
        return [((0, first), part) for part in self._windows(item, second, room, beside)]

    def _less(self, item: Item[TextInput]) -> int:
        """How many tokens fewer than the model's setting an input may have."""
        asked = item.input.params.max_length
        return 0 if asked is None else max(0, self.longest - asked)

    def _check(self, item: Item[TextInput], first: int, second: int, room: int) -> tuple[int, int]:
        """How much stays of texts that have no room; raises UnusableRequest where none may go."""
        limit = self.longest - self._less(item)
        return kept(first, second, room, limit, item.input.params.truncation)

    def predict(self, encodings: Sequence[TextEncoding], outputs: Outputs) -> list[Prediction]:
        """`{"label", "score"}`, or with `top_k` a list of them sorted by score."""
        logits = _of_windows(encodings, outputs.values)
        usual = encodings[0].item.input.params
        if all(e.item.input.params is usual for e in encodings):
            return self._group(usual, logits)
        groups: dict[Parameters, list[int]] = {}
        for i, encoding in enumerate(encodings):
            groups.setdefault(encoding.item.input.params, []).append(i)
        predictions: list[Prediction] = [{}] * len(encodings)
        for params, members in groups.items():
            for i, prediction in zip(members, self._group(params, logits[members]), strict=True):
                predictions[i] = prediction
        return predictions

    def _group(self, params: Parameters, logits: Floats) -> list[Prediction]:
        function = params.function_to_apply or self._function
        labels = self._labels
        if params.top_k is None:
            best = logits.argmax(axis=1)  # every function keeps the order
            scores = apply(function, logits)[np.arange(len(logits)), best]
            return [
                {"label": labels[i], "score": score}
                for i, score in zip(best.tolist(), scores.tolist(), strict=True)
            ]
        order = np.argsort(-logits, axis=1, kind="stable")[:, : params.top_k]
        scores = np.take_along_axis(apply(function, logits), order, axis=1)
        return [
            [{"label": labels[i], "score": s} for i, s in zip(row, row_scores, strict=True)]
            for row, row_scores in zip(order.tolist(), scores.tolist(), strict=True)
        ]

    def parts(self, encoding: TextEncoding) -> list[list[Part]]:
        """The text, or both of the pair, as far as each sequence has them."""
        template = self._template
        alone = len(encoding.spans[0]) == 1
        out = []
        for spans in encoding.spans:
            at = len(template.single_before if alone else template.before)
            parts = []
            for text, (begin, end) in enumerate(spans):
                parts.append(Part(text, begin, end - begin, at))
                at += end - begin + len(template.between)
            out.append(parts)
        return out

    def explained(self, encoding: TextEncoding, outputs: Outputs) -> Explained:
        """The logit of the best label, or of the one that the request names.

        Of several windows it is the mean of all, or that of the one where it is largest.
        """
        params = encoding.item.input.params
        logits = _of_windows([encoding], outputs.values)
        label = self._target(params)
        if label is None:
            label = int(logits[0].argmax())
        scores = apply(params.function_to_apply or self._function, logits)
        answer = {"label": self._labels[label], "score": float(scores[0, label])}
        windows: Sequence[int] = range(len(outputs.values))
        if params.long_texts == "max":
            windows = (int(outputs.values[:, label].argmax()),)
        return Explained(answer, windows, (Reason("importances", "delta", label),))

    def _target(self, params: Parameters) -> int | None:
        """The label that a request names; raises UnusableRequest where there is no such label."""
        target = params.target if isinstance(params, ExplanationParameters) else None
        if isinstance(target, str) and target in self._labels:
            return self._labels.index(target)
        if isinstance(target, str) or not 0 <= (target or 0) < len(self._labels):
            raise UnusableRequest(
                "'target' must be the name of a label or its number, of which the last is "
                f"{len(self._labels) - 1}"
            )
        return target


def _of_windows(encodings: Sequence[TextEncoding], logits: Floats) -> Floats:
    """Logits `[windows, labels]` of all inputs' windows as one row an input."""
    if len(logits) == len(encodings):
        return logits
    counts = np.array([len(e.sequences) for e in encodings])
    firsts = np.cumsum(counts) - counts
    means = np.add.reduceat(logits, firsts) / counts[:, None].astype(np.float32)
    most = [e.item.input.params.long_texts == "max" for e in encodings]
    rows: Floats = np.where(np.array(most)[:, None], np.maximum.reduceat(logits, firsts), means)
    return rows


class SequenceClassification(Task[TextInput, Parameters, TextEncoding, ClassificationSettings]):
    """A label, or several, for a text or a pair of texts."""

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    per_token = False
    labelled = True
    required = ("text",)
    optional = ("text_pair",)
    ignored: ClassVar[tuple[str, ...]] = ("target",)  # TorchServe's published sample has it
    bare = "text"
    nested = True
    parameters = Parameters
    nulls: ClassVar[Mapping[str, object]] = {"top_k": ALL_LABELS}
    aliases: ClassVar[Mapping[str, Alias]] = {
        "topk": Alias("top_k"),
        "return_all_scores": Alias("top_k", {True: ALL_LABELS, False: 1}),
    }
    listed: ClassVar[Mapping[str, object]] = {"top_k": ALL_LABELS}
    settings = ClassificationSettings
    columns_of: ClassVar[Mapping[str, Column]] = {
        "label": Column("BYTES", ""),
        "score": Column("FP32", 0.0),
    }
    measured_as = "labels"
    sample: ClassVar[Mapping[str, object]] = {
        "text": "A warm, funny film that never overstays its welcome."
    }

    def head(self) -> Head:
        """Pooler and classifier over the first token."""
        from ft_handler.model.heads import PooledHead

        return Head(
            PooledHead,
            {
                "pooler_weight": "{base}.pooler.dense.weight",
                "pooler_bias": "{base}.pooler.dense.bias",
                "classifier_weight": "classifier.weight",
                "classifier_bias": "classifier.bias",
            },
            "classifier",
        )

    def read(self, texts: Mapping[str, Any], params: Parameters) -> TextInput:
        """A text, or a pair."""
        return TextInput(texts["text"], texts.get("text_pair"), params)

    def runner(
        self, settings: ClassificationSettings, loaded: Loaded
    ) -> Runner[TextInput, Parameters, Any]:
        """Labels come from the archive, else from the traced file."""
        return ClassificationRunner(settings, loaded)

    def explanation(self) -> AnyTask:
        """What each word does for a label."""
        return ClassificationExplanation()


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class ExplanationParameters(Parameters):
    """How one text is explained; of the labels one is explained, whatever `top_k` says.

    target  a label or its number; None is the best one
    """

    target: int | str | None = None


class ExplainedClassificationRunner(ClassificationRunner):
    """Classification whose requests may name the label they ask about."""

    def __init__(self, settings: ClassificationSettings, loaded: Loaded) -> None:
        super().__init__(settings, loaded)
        self.defaults = ExplanationParameters(
            **{field.name: getattr(self.defaults, field.name) for field in fields(Parameters)}
        )

    def encode(self, items: Sequence[Item[TextInput]]) -> list[TextEncoding]:
        """As for a prediction; a target that is no label is refused."""
        for item in items:
            try:
                self._target(item.input.params)
            except UnusableRequest as error:
                item.result = error
        return super().encode([item for item in items if item.result is None])


class ClassificationExplanation(SequenceClassification):
    """What each word of a text or a pair does for a label."""

    ignored = ()
    nested = False
    parameters = ExplanationParameters
    listed: ClassVar[Mapping[str, object]] = {}
    columns_of: ClassVar[Mapping[str, Column]] = {}
    answers_as = EXPLANATIONS

    def runner(
        self, settings: ClassificationSettings, loaded: Loaded
    ) -> Runner[TextInput, Parameters, Any]:
        """One word after the other is left out."""
        return OcclusionRunner(self, ExplainedClassificationRunner(settings, loaded), loaded)


TASK = SequenceClassification()
