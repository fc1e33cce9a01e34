"""A label for every token of a text, or entities of them, as transformers 4.57's pipeline does.

Tokens get a softmax over the labels. Strategies: `none` answers tokens; `simple` joins neighbours
of one kind to entities, unless a label begins with "B-"; `first`, `average` and `max` give every
word one label before that. Long texts are cut into overlapping windows, and each token is read in
the window whose edges are farthest from it, so that what is joined never saw an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from ft_handler.config import LARGEST_WHOLE, AnyCase, Settings, Whole, setting
from ft_handler.errors import ConfigError, RequestError, UnusableRequest
from ft_handler.tasks.base import Alias, Column, Head, Loaded, Runner, Task
from ft_handler.tasks.scores import softmax
from ft_handler.tasks.windows import default_overlap, even_spans, hold_windows
from ft_handler.text.pieces import word_begins
from ft_handler.text.readers import Origins
from ft_handler.types import Encoding, Floats, Ids, Item, Outputs, Prediction

Indices = NDArray[np.int64]
Strategy = Literal["none", "simple", "first", "average", "max"]


def _names(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("must be a list of labels")


Labels = Annotated[tuple[str, ...], BeforeValidator(_names)]


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class Parameters:
    """How the tokens of one text are labelled.

    ignore_labels    what is left out of the answer
    stride           least tokens that windows share; None is a quarter of a window, at most 128
    ignore_subwords  an older switch: what is `simple` is `first`
    """

    aggregation_strategy: Annotated[Strategy, AnyCase] = "none"
    ignore_labels: Labels = ("O",)
    stride: Annotated[int, Field(ge=0, le=LARGEST_WHOLE)] | None = None
    ignore_subwords: bool = False

    @property
    def strategy(self) -> Strategy:
        """The strategy that the switches amount to."""
        simple = self.aggregation_strategy == "simple"
        return "first" if simple and self.ignore_subwords else self.aggregation_strategy


class TokenSettings(Settings):
    """Defaults of the parameters."""

    aggregation_strategy: Annotated[Strategy, AnyCase] = setting(
        "none",
        "`none` answers every token; `simple` joins tokens to entities; `first`, `average` and "
        "`max` do so with one label a word. A request may override it.",
    )
    ignore_labels: Labels = setting(
        ("O",), "Labels that are left out of answers. A request may override it."
    )
    stride: Whole | None = setting(
        None,
        "Least tokens that neighbouring windows of a long text share; null is a quarter of a "
        "window, at most 128. A request may override it.",
        0,
    )


@plain_dataclass(slots=True)
class TokenInput:
    """One text whose tokens are labelled."""

    text: str
    params: Parameters

    @property
    def texts(self) -> tuple[str, ...]:
        """The text."""
        return (self.text,)


@plain_dataclass(slots=True, eq=False)
class TokenEncoding(Encoding[TokenInput]):
    """The windows of one text.

    ids, origins  of all its tokens
    places        [tokens] where each is read, counted from the first token of the first window
    """

    ids: Ids
    origins: Origins
    places: Indices


def hand_over(spans: Sequence[tuple[int, int]], begins: NDArray[np.bool_]) -> list[int]:
    """The first token that each window but the first is read for.

    It is in the middle of what the window shares with the one before, or where a word begins
    nearest to that, if one does in the middle half.

    begins  [tokens] whether a token begins a word
    """
    firsts = []
    for (_, end), (begin, _) in pairwise(spans):
        middle, reach = (begin + end) // 2, (end - begin) // 4
        words = middle - reach + np.flatnonzero(begins[middle - reach : middle + reach + 1])
        firsts.append(int(words[np.abs(words - middle).argmin()]) if len(words) else middle)
    return firsts


class TokenRunner(Runner[TokenInput, Parameters, TokenEncoding]):
    """Texts to windows of at most `max_length` tokens; logits `[labels, total]` to entities."""

    def __init__(self, settings: TokenSettings, loaded: Loaded) -> None:
        self.defaults = Parameters(
            settings.aggregation_strategy, settings.ignore_labels, settings.stride
        )
        self.longest = loaded.max_length
        self._reader, self._pieces = loaded.reader, loaded.pieces
        self._template = loaded.template
        self._lead = len(self._template.single_before)
        self._room = self.longest - self._lead - len(self._template.single_after)
        if self._room < 1:
            raise ConfigError(f"setting 'max_length' ({self.longest}) leaves no room for text")
        if settings.stride is not None and settings.stride >= self._room:
            raise ConfigError(
                f"setting 'stride' ({settings.stride}) leaves windows of {self._room} tokens no "
                "way forward"
            )
        labels = [loaded.labels[i] for i in range(len(loaded.labels))]
        self._labels = labels
        # "B-" and "I-" are no part of a kind; other prefixes are, though no answer shows them.
        kinds = [name[2:] if name.startswith(("B-", "I-")) else name for name in labels]
        numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        self._kinds = np.array([numbers[kind] for kind in kinds])
        self._starts = np.array([name.startswith("B-") for name in labels])
        self._groups = [name.split("-", 1)[-1] for name in labels]

    def encode(self, items: Sequence[Item[TokenInput]]) -> list[TokenEncoding]:
        """The windows of every text; one whose windows could not get on is refused."""
        ids, origins = self._reader.located([item.input.text for item in items])
        out: list[TokenEncoding] = []
        for parts in zip(items, ids, origins, strict=True):
            try:
                out.append(self._windows(*parts))
            except RequestError as error:
                parts[0].result = error
        return out

    def _windows(self, item: Item[TokenInput], ids: Ids, origins: Origins) -> TokenEncoding:
        lead = self._lead
        if len(ids) <= self._room:
            sequence = self._template.alone(ids)
            places = np.arange(lead, lead + len(ids))
            return TokenEncoding(item, [sequence], [len(sequence)], False, ids, origins, places)
        overlap = self._overlap(item.input.params)
        beside = self.longest - self._room
        hold_windows(len(ids), self._room, overlap, beside, self.most_tokens, "stride")
        spans = even_spans(len(ids), self._room, overlap)
        sequences = [self._template.alone(ids[a:b]) for a, b in spans]
        firsts = [0, *hand_over(spans, word_begins(origins)), len(ids)]
        places = np.empty(len(ids), np.int64)
        for number, (first, last) in enumerate(pairwise(firsts)):
            shift = number * self.longest + lead - spans[number][0]
            places[first:last] = np.arange(first, last) + shift
        lengths = [len(sequence) for sequence in sequences]
        return TokenEncoding(item, sequences, lengths, False, ids, origins, places)

    def _overlap(self, params: Parameters) -> int:
        """Tokens that windows share at least; raises UnusableRequest where they cannot."""
        if params.stride is None:
            return default_overlap(self._room)
        if params.stride >= self._room:
            raise UnusableRequest(
                f"the text needs several windows of {self._room} tokens, but 'stride' has "
                f"neighbours share {params.stride}"
            )
        return params.stride

    def predict(self, encodings: Sequence[TokenEncoding], outputs: Outputs) -> list[Prediction]:
        """A list of tokens or of entities in the order of the text, which may be empty."""
        groups: dict[Parameters, list[int]] = {}
        for i, encoding in enumerate(encodings):
            groups.setdefault(encoding.item.input.params, []).append(i)
        windows = np.cumsum([0, *(len(e.sequences) for e in encodings)])[:-1]
        begins = (np.cumsum(outputs.lengths) - outputs.lengths)[windows].tolist()
        predictions: list[Prediction] = [[]] * len(encodings)
        for params, members in groups.items():
            texts = [encodings[i] for i in members]
            columns = [e.places + begins[i] for i, e in zip(members, texts, strict=True)]
            answers = self._group(params, texts, outputs.values[:, np.concatenate(columns)])
            for i, answer in zip(members, answers, strict=True):
                predictions[i] = answer
        return predictions

    def _group(
        self, params: Parameters, texts: Sequence[TokenEncoding], logits: Floats
    ) -> list[list[dict[str, object]]]:
        """Answers of texts with the same parameters; logits `[labels, tokens]` of all of them."""
        answers: list[list[dict[str, object]]] = [[] for _ in texts]
        counts = np.array([len(e.ids) for e in texts])
        if not counts.any():
            return answers
        scores, ends = softmax(logits, axis=0), np.cumsum(counts)
        begins = ends - counts
        strategy, total = params.strategy, int(ends[-1])
        units = np.arange(total)  # the first token of all that gets a label: tokens or words
        if strategy in _COMBINED:
            words = [self._pieces.begin_words(e.ids, e.origins, e.item.input.text) for e in texts]
            units = np.flatnonzero(np.concatenate(words))
            scores = _COMBINED[strategy](scores, units)
        labels = scores.argmax(axis=0)
        best, runs, names = scores.max(axis=0), np.arange(len(units)), self._labels
        if strategy != "none":
            runs, names = self._runs(labels, np.isin(units, begins)), self._groups
            labels, best = labels[runs], _means(best, runs)
        shown = np.array([name not in params.ignore_labels for name in names])
        kept = np.flatnonzero(shown[labels])
        unit_edges, run_edges = [*units.tolist(), total], [*runs.tolist(), len(units)]
        owners = np.searchsorted(ends, units[runs[kept]], side="right")
        for run, label, score, owner, shift in zip(
            kept.tolist(), labels[kept].tolist(), best[kept].tolist(), owners.tolist(),
            begins[owners].tolist(), strict=True,
        ):  # fmt: skip
            cuts = [i - shift for i in unit_edges[run_edges[run] : run_edges[run + 1] + 1]]
            answers[owner].append(self._answer(strategy, names[label], score, texts[owner], cuts))
        return answers

    def _runs(self, labels: Indices, firsts: NDArray[np.bool_]) -> Indices:
        """The first unit of every entity; labels and whether they begin a text, [units]."""
        kinds = self._kinds[labels]
        new = firsts | self._starts[labels]
        new[1:] |= kinds[1:] != kinds[:-1]
        return np.flatnonzero(new)

    def _answer(
        self, strategy: Strategy, name: str, score: float, text: TokenEncoding, cuts: list[int]
    ) -> dict[str, object]:
        """What stands between the first and the last cut; the others are between its units."""
        first, last = cuts[0], cuts[-1]
        origins, pieces = text.origins[first:last], self._pieces
        spelled = pieces.spelled(text.ids[first:last], origins, text.item.input.text)
        place = {"start": int(origins[0, 0]), "end": int(origins[-1, 1])}
        if strategy == "none":
            index = first + self._lead
            return {"entity": name, "score": score, "index": index, "word": spelled[0], **place}
        if strategy != "simple":
            spelled = [pieces.joined(spelled[a - first : b - first]) for a, b in pairwise(cuts)]
        return {"entity_group": name, "score": score, "word": pieces.joined(spelled), **place}


def _means(values: Floats, firsts: Indices) -> Floats:
    """The mean of each run along the last axis; runs begin at `firsts` and fill it."""
    counts = np.diff(firsts, append=values.shape[-1])
    means: Floats = np.add.reduceat(values, firsts, axis=-1)
    means /= counts.astype(np.float32)
    return means


def _most_certain(scores: Floats, firsts: Indices) -> Floats:
    """The scores `[labels, words]` of each word's token that has the largest one, the first."""
    best = scores.max(axis=0)
    words = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(best)))
    candidates = np.flatnonzero(best == np.maximum.reduceat(best, firsts)[words])
    chosen: Floats = scores[:, candidates[np.unique(words[candidates], return_index=True)[1]]]
    return chosen


#: How the scores of a word's tokens become the word's: `[labels, tokens]` and where words begin.
_COMBINED: Mapping[str, Callable[[Floats, Indices], Floats]] = {
    "first": lambda scores, firsts: scores[:, firsts],
    "average": _means,
    "max": _most_certain,
}


class TokenClassification(Task[TokenInput, Parameters, TokenEncoding, TokenSettings]):
    """Labels of tokens, or the entities they make."""

    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    per_token = True
    labelled = True
    required = ("text",)
    ignored = ("target",)  # TorchServe's published sample has it
    bare = "text"
    parameters = Parameters
    aliases: ClassVar[Mapping[str, Alias]] = {
        "grouped_entities": Alias("aggregation_strategy", {True: "simple", False: "none"})
    }
    settings = TokenSettings
    columns_of: ClassVar[Mapping[str, Column]] = {
        "entity": Column("BYTES", "", optional=True),
        "entity_group": Column("BYTES", "", optional=True),
        "score": Column("FP32", 0.0),
        "index": Column("INT64", 0, optional=True),
        "word": Column("BYTES", ""),
        "start": Column("INT64", 0),
        "end": Column("INT64", 0),
    }
    measured_as = "entities"
    sample: ClassVar[Mapping[str, object]] = {
        "text": "Ada Lindqvist designed the old bridge in Gothenburg."
    }

    def head(self) -> Head:
        """A classifier over every token."""
        from ft_handler.model.heads import TokenHead

        return Head(
            TokenHead,
            {"classifier_weight": "classifier.weight", "classifier_bias": "classifier.bias"},
            "classifier",
        )

    def read(self, texts: Mapping[str, str], params: Parameters) -> TokenInput:
        """A text."""
        return TokenInput(texts["text"], params)

    def runner(self, settings: TokenSettings, loaded: Loaded) -> TokenRunner:
        """Labels come from the archive, else from the traced file."""
        return TokenRunner(settings, loaded)


TASK = TokenClassification()
