"""Explanations by occlusion: what each word of an input does for the model's answer.

The sequences of an input are computed whole, once for each of their words with its tokens replaced
by the mask, and once with all of them replaced. A word's importance is the explained logit of the
whole less the logit without the word. Tokens are replaced and not taken out, so that all others
keep their places: what changes is the word alone, and answers that are places stay where they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ft_handler.errors import ConfigError, RequestTooLarge
from ft_handler.tasks.base import AnyTask, EncodingT, Loaded, ParamsT, Runner
from ft_handler.text.readers import Origins
from ft_handler.types import Encoding, Floats, Ids, InputT, Item, Outputs, Prediction

#: An input's sequences are at most so many times those that its words would make in one window:
#: a request may ask for windows that nearly all have the same words.
MOST_WINDOWS = 4
#: What KServe v1 calls the answers of a task that explains.
EXPLANATIONS = "explanations"

Rows = NDArray[np.int64]


class Part(NamedTuple):
    """Tokens of one of an input's texts inside a sequence.

    text    which of the input's `texts`
    begin   the first of that text's tokens that is there
    tokens  how many are
    at      where the first one stands in the sequence
    """

    text: int
    begin: int
    tokens: int
    at: int


class Reason(NamedTuple):
    """One output that is explained.

    importances, delta  what the answer calls its importances and their delta
    column              of the outputs
    token               place in the sequence, where outputs are for each token
    """

    importances: str
    delta: str
    column: int
    token: int = 0


class Explained(NamedTuple):
    """What is explained of one answer.

    answer     what it says, such as a label and its score
    sequences  which of the encoding's sequences it comes from; of several the mean is explained
    reasons    its outputs there
    """

    answer: Mapping[str, object]
    sequences: Sequence[int]
    reasons: Sequence[Reason]


class Explainable(Runner[InputT, ParamsT, EncodingT]):
    """A runner whose answers can be explained."""

    @abstractmethod
    def parts(self, encoding: EncodingT) -> list[list[Part]]:
        """Where the input's texts stand in each sequence, in the sequence's order."""

    @abstractmethod
    def explained(self, encoding: EncodingT, outputs: Outputs) -> Explained:
        """What to explain of one encoding; `outputs` are those of its sequences."""


@dataclass(slots=True, eq=False)
class OccludedEncoding(Encoding[InputT], Generic[InputT, EncodingT]):
    """An item's sequences, each followed by those without a word and the one without any.

    whole   the encoding that is explained
    places  [words, 3] of every word the number of its text, and its first character and its end
    runs    of each whole sequence [words in it, 3]: a word's number, and its tokens' begin and end
    """

    whole: EncodingT
    places: Rows
    runs: list[Rows]


class OcclusionRunner(Runner[InputT, ParamsT, OccludedEncoding[InputT, EncodingT]]):
    """Explains what a runner answers; raises ConfigError where the tokenizer has no mask."""

    def __init__(
        self, task: AnyTask, runner: Explainable[InputT, ParamsT, EncodingT], loaded: Loaded
    ) -> None:
        if loaded.mask is None:
            raise ConfigError(
                "answers cannot be explained: the tokenizer has neither a mask nor an unknown token"
            )
        self.defaults, self.longest = runner.defaults, runner.longest
        self._runner, self._reader = runner, loaded.reader
        self._mask, self._most = loaded.mask, loaded.most_words
        self._per_token = task.per_token
        self._fields = (*task.required, *task.optional)

    def bound(self, most_tokens: int | None) -> None:
        """The same for what is explained."""
        super().bound(most_tokens)
        self._runner.bound(most_tokens)

    def encode(self, items: Sequence[Item[InputT]]) -> list[OccludedEncoding[InputT, EncodingT]]:
        """Of an input with n words in one sequence n + 2 sequences; too many words are refused."""
        encodings = self._runner.encode(items)
        texts = [text for encoding in encodings for text in encoding.item.input.texts]
        origins = iter(self._reader.located(texts)[1] if texts else ())
        out: list[OccludedEncoding[InputT, EncodingT]] = []
        for encoding in encodings:
            own = [next(origins) for _ in encoding.item.input.texts]
            places, runs = words_of(self._runner.parts(encoding), own)
            try:
                self._check(len(places), sum(len(words) + 2 for words in runs))
            except RequestTooLarge as error:
                encoding.item.result = error
                continue
            sequences: list[Ids] = []
            splits: list[int] = []
            for whole, split, words in zip(encoding.sequences, encoding.splits, runs, strict=True):
                sequences += occluded(whole, words, self._mask)
                splits += [split] * (len(words) + 2)
            out.append(
                OccludedEncoding(
                    encoding.item, sequences, splits, encoding.truncated, encoding, places, runs
                )
            )
        return out

    def _check(self, words: int, sequences: int) -> None:
        """Raise RequestTooLarge for an input that is not explained."""
        if words > self._most:
            raise RequestTooLarge(
                f"the model reads {words} words of this input, at most {self._most} are explained: "
                "send a shorter text"
            )
        most = MOST_WINDOWS * (self._most + 2)
        if sequences > most:
            raise RequestTooLarge(
                f"with its windows this input is explained by {sequences} sequences, at most "
                f"{most} are computed: send a shorter text, or have longer windows that share less"
            )

    def predict(
        self, encodings: Sequence[OccludedEncoding[InputT, EncodingT]], outputs: Outputs
    ) -> list[Prediction]:
        """Words with their importances, and what is explained.

        A word outside the sequences that the answer comes from does nothing for it: it has 0.
        """
        ends = np.cumsum(outputs.lengths)
        first = 0
        predictions: list[Prediction] = []
        for encoding in encodings:
            groups = np.array([len(words) + 2 for words in encoding.runs])
            wholes = first + np.cumsum(groups) - groups
            first += int(groups.sum())
            explained = self._runner.explained(encoding.whole, self._wholes(outputs, ends, wholes))
            answer = self._words(encoding)
            for reason in explained.reasons:
                importances = np.zeros(len(encoding.places))
                everything = 0.0  # what all words do together
                for sequence in explained.sequences:
                    rows = wholes[sequence] + np.arange(groups[sequence])
                    logits = self._logits(outputs, ends, rows, reason) / len(explained.sequences)
                    importances[encoding.runs[sequence][:, 0]] += logits[0] - logits[1:-1]
                    everything += logits[0] - logits[-1]
                answer[reason.importances] = importances.tolist()
                answer[reason.delta] = float(importances.sum() - everything)
            predictions.append({**answer, **explained.answer})
        return predictions

    def _wholes(self, outputs: Outputs, ends: Rows, wholes: Rows) -> Outputs:
        """The outputs of the sequences in which every word is."""
        lengths = outputs.lengths[wholes]
        if not self._per_token:
            return Outputs(outputs.values[wholes], lengths)
        spans = zip((ends[wholes] - lengths).tolist(), ends[wholes].tolist(), strict=True)
        return Outputs(
            np.concatenate([outputs.values[:, begin:end] for begin, end in spans], axis=1), lengths
        )

    def _logits(
        self, outputs: Outputs, ends: Rows, rows: Rows, reason: Reason
    ) -> NDArray[np.float64]:
        """One output in each of the sequences `rows`."""
        values: Floats
        if self._per_token:
            values = outputs.values[
                reason.column, ends[rows] - outputs.lengths[rows] + reason.token
            ]
        else:
            values = outputs.values[rows, reason.column]
        return values.astype(np.float64)

    def _words(self, encoding: OccludedEncoding[InputT, EncodingT]) -> dict[str, object]:
        texts = encoding.item.input.texts
        places = encoding.places.tolist()
        return {
            "words": [texts[text][begin:end] for text, begin, end in places],
            "offsets": [[begin, end] for _, begin, end in places],
            "fields": [self._fields[text] for text, _, _ in places],
        }


def words_of(
    sequences: Sequence[Sequence[Part]], origins: Sequence[Origins]
) -> tuple[Rows, list[Rows]]:
    """The words of an encoding's sequences, as `OccludedEncoding` has them.

    sequences  the parts of each
    origins    of each text
    """
    found: list[Any] = []
    for number, parts in enumerate(sequences):
        for text, begin, tokens, at in parts:
            words = origins[text][begin : begin + tokens, 2:].astype(np.int64)
            changes = np.flatnonzero((words[1:] != words[:-1]).any(axis=1)) + 1
            starts = np.concatenate(([0], changes))[: len(words)]
            stops = np.append(starts[1:], len(words))[: len(words)]
            of = np.broadcast_to([number, text], (len(starts), 2))
            found.append(np.column_stack((of, words[starts], at + starts, at + stops)))
    table = np.concatenate(found)
    places, numbers = np.unique(table[:, 1:4], axis=0, return_inverse=True)
    runs = np.column_stack((numbers.reshape(-1), table[:, 4:]))
    return places, [runs[table[:, 0] == number] for number in range(len(sequences))]


def occluded(whole: Ids, words: Rows, mask: int) -> list[Ids]:
    """The sequence, it without each word, and it without all of them.

    words  [words, 3] with the begin and the end of each word's tokens in the last two columns
    """
    out = np.tile(whole, (len(words) + 2, 1))
    for row, (_, begin, end) in enumerate(words.tolist(), 1):
        out[[row, -1], begin:end] = mask
    return list(out)
