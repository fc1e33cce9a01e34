"""A query with candidate texts, sorted by relevance, scored as sentence-transformers does.

Each candidate is a pair with the query, one sequence; the query is read once. The order is that of
the logits in fp32, whatever the scores are rounded to, and among equal ones that of the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import chain, islice
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ft_handler.config import LARGEST_WHOLE, AnyCase, Flag, Settings, Whole, setting
from ft_handler.errors import ConfigError, MalformedRequest, ModelError, UnusableRequest
from ft_handler.tasks.base import Alias, Column, Head, Loaded, Runner, Task
from ft_handler.tasks.pairs import Truncation, kept
from ft_handler.tasks.scores import sigmoid
from ft_handler.tasks.sequence_classification import TASK as CLASSIFICATION
from ft_handler.types import Encoding, Floats, Ids, Item, Outputs, Prediction

_Tokens = Annotated[int, Field(ge=1, le=LARGEST_WHOLE)]


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class Parameters:
    """How candidates are cut, scored and returned.

    top_n                 how many of the best; None and 0 are all
    raw_scores            logits instead of what the model makes of them
    return_text           answers hold their candidate's text
    truncation            what of too long a pair may be cut; the query is its first text
    truncation_direction  which end stays: "right" cuts the last tokens
    max_length            most tokens of a pair; None, and whatever is more, is the model's setting
    max_tokens_per_doc    most tokens of a candidate; None is as many as fit
    """

    top_n: Annotated[int, Field(ge=0, le=LARGEST_WHOLE)] | None = None
    raw_scores: bool = False
    return_text: bool = False
    truncation: Truncation = True
    truncation_direction: Annotated[Literal["right", "left"], AnyCase] = "right"
    max_length: _Tokens | None = None
    max_tokens_per_doc: _Tokens | None = None


class RerankingSettings(Settings):
    """Defaults of the parameters, and how many candidates there may be."""

    top_n: Whole | None = setting(
        None,
        "How many of the best candidates are returned; null is all. A request may override it.",
        1,
    )
    raw_scores: Flag = setting(
        False, "Scores are the logits as they are. A request may override it."
    )
    return_text: Flag = setting(
        False, "Answers hold the text of their candidate. A request may override it."
    )
    truncation: Truncation = setting(
        True,
        "Pairs over `max_length`: true cuts whichever text is longer, as sentence-transformers "
        'does, and says so in the answer (`"truncated": true`); `only_second` leaves the query '
        "whole, `only_first` the candidate; false answers 422. A request may override it.",
    )
    max_tokens_per_doc: Whole | None = setting(
        None,
        "Most tokens of a candidate, longer ones are cut; null is as many as fit beside the query. "
        "A request may override it.",
        1,
    )
    max_texts: Whole = setting(1000, "Most candidates of one query; more answers 413.", 1)
    function_to_apply: Annotated[Literal["sigmoid", "none"] | None, AnyCase] = setting(
        None,
        "`sigmoid` or `none` (a string) over the logits; null is what sentence-transformers "
        "configured, else sigmoid.",
    )


@plain_dataclass(slots=True)
class Candidates:
    """A query and what is to be sorted.

    named_results  the answer takes the form that clients of Cohere, Jina and vLLM expect
    """

    query: str
    candidates: tuple[str, ...]
    named_results: bool
    params: Parameters

    @property
    def texts(self) -> tuple[str, ...]:
        """The query and every candidate."""
        return (self.query, *self.candidates)


@plain_dataclass(slots=True, eq=False)
class PairsEncoding(Encoding[Candidates]):
    """A sequence a candidate.

    cut  whether the pair of a candidate was cut
    """

    cut: list[bool]


class RerankingRunner(Runner[Candidates, Parameters, PairsEncoding]):
    """Candidates to pairs of at most `max_length` tokens; logits `[pairs, 1]` to an order."""

    def __init__(self, settings: RerankingSettings, loaded: Loaded) -> None:
        if len(loaded.labels) != 1:
            raise ConfigError(
                f"reranking needs a head with one output, and the traced file has "
                f"{len(loaded.labels)}: such a model is served for {CLASSIFICATION.name}"
            )
        self.defaults = Parameters(
            top_n=settings.top_n,
            raw_scores=settings.raw_scores,
            return_text=settings.return_text,
            truncation=settings.truncation,
            max_tokens_per_doc=settings.max_tokens_per_doc,
        )
        self.longest, self.most_texts = loaded.max_length, settings.max_texts
        self._reader, self._template = loaded.reader, loaded.template
        self._function = settings.function_to_apply or loaded.info.function_to_apply or "sigmoid"
        if self.longest <= self._template.pair_specials:
            raise ConfigError(f"setting 'max_length' ({self.longest}) leaves no room for text")

    def encode(self, items: Sequence[Item[Candidates]]) -> list[PairsEncoding]:
        """A sequence a candidate; an item with too long a pair is refused where nothing is cut."""
        ids = iter(self._reader.ids([*chain.from_iterable(item.input.texts for item in items)]))
        out: list[PairsEncoding] = []
        for item in items:
            query = next(ids)
            candidates = [*islice(ids, len(item.input.candidates))]
            try:
                out.append(self._pairs(item, query, candidates))
            except UnusableRequest as error:
                item.result = error
        return out

    def _pairs(
        self, item: Item[Candidates], query: Ids, candidates: Sequence[Ids]
    ) -> PairsEncoding:
        params = item.input.params
        limit = min(self.longest, params.max_length or self.longest)
        room = limit - self._template.pair_specials
        left = params.truncation_direction == "left"
        encoding = PairsEncoding(item, [], [], False, [])
        for place, whole in enumerate(candidates):
            candidate = _end(whole, params.max_tokens_per_doc or len(whole), left)
            sizes = len(query), len(candidate)
            if sum(sizes) > room:
                try:
                    sizes = kept(*sizes, room, limit, params.truncation)
                except UnusableRequest as error:
                    raise UnusableRequest(f"with candidate {place} {error}") from None
            sequence, split = self._template.pair(
                _end(query, sizes[0], left), _end(candidate, sizes[1], left)
            )
            encoding.sequences.append(sequence)
            encoding.splits.append(split)
            encoding.cut.append(sum(sizes) < len(query) + len(whole))
        return encoding

    def predict(self, encodings: Sequence[PairsEncoding], outputs: Outputs) -> list[Prediction]:
        """`[{"index", "score", "text"?}]`, or `{"results": [...]}` as Cohere's clients expect."""
        predictions: list[Prediction] = []
        begin = 0
        for encoding in encodings:
            end = begin + len(encoding.sequences)
            predictions.append(self._sorted(encoding, outputs.values[begin:end, 0]))
            begin = end
        return predictions

    def _sorted(self, encoding: PairsEncoding, logits: Floats) -> Prediction:
        asked = encoding.item.input
        order = np.argsort(-logits, kind="stable")[: asked.params.top_n or None]
        raw = asked.params.raw_scores or self._function == "none"
        scores = logits[order] if raw else sigmoid(logits[order])
        named = asked.named_results
        answers: list[dict[str, object]] = []
        for index, score in zip(order.tolist(), scores.tolist(), strict=True):
            answer = {"index": index, "relevance_score" if named else "score": score}
            if asked.params.return_text:
                text = asked.candidates[index]
                answer |= {"document": {"text": text}} if named else {"text": text}
            if encoding.cut[index]:
                answer["truncated"] = True
            answers.append(answer)
        return {"results": answers} if named else answers


def _end(ids: Ids, count: int, left: bool) -> Ids:
    """The first tokens of a text, or where its left is cut the last ones."""
    return ids[max(0, len(ids) - count) :] if left else ids[:count]


class Reranking(Task[Candidates, Parameters, PairsEncoding, RerankingSettings]):
    """Candidates for a query, sorted by relevance."""

    name = "reranking"
    auto_class = CLASSIFICATION.auto_class
    per_token = False
    labelled = True
    required = ("query", "texts")
    lists = ("texts",)
    synonyms: ClassVar[Mapping[str, str]] = {"documents": "texts"}
    # What clients of Cohere, Jina and vLLM send along for servers of several models.
    ignored = ("model", "user", "max_chunks_per_doc", "priority")
    parameters = Parameters
    aliases: ClassVar[Mapping[str, Alias]] = {
        "truncate": Alias("truncation"),
        "return_documents": Alias("return_text"),
        "truncate_prompt_tokens": Alias("max_length"),
        "use_activation": Alias("raw_scores", {True: False, False: True}),
    }
    settings = RerankingSettings
    columns_of: ClassVar[Mapping[str, Column]] = {
        "index": Column("INT64", -1),
        "score": Column("FP32", 0.0),
    }
    measured_as = "orders"
    sample: ClassVar[Mapping[str, object]] = {
        "query": "When does the library open?",
        "texts": [
            "The museum shows paintings of the harbour.",
            "The town library opens at nine in the morning and closes at six.",
        ],
    }

    def head(self) -> Head:
        """That of sequence classification, with one output."""
        return CLASSIFICATION.head()

    def columns(self, config: Any) -> int:
        """One; raises ModelError for a checkpoint with more outputs."""
        if config.num_labels != 1:
            raise ModelError(
                f"reranking needs a head with one output, and this checkpoint has "
                f"{config.num_labels}: trace it for {CLASSIFICATION.name}"
            )
        return 1

    def read(self, texts: Mapping[str, Any], params: Parameters) -> Candidates:
        """A query with its candidates, under one of the two names that they have."""
        named = "documents" in texts
        if named == ("texts" in texts):
            raise MalformedRequest("the input must have one of 'texts' and 'documents'")
        return Candidates(texts["query"], texts["documents" if named else "texts"], named, params)

    def runner(self, settings: RerankingSettings, loaded: Loaded) -> RerankingRunner:
        """Pairs of at most `max_length` tokens."""
        return RerankingRunner(settings, loaded)


TASK = Reranking()
