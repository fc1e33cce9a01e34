"""A question about a context, answered by spans of it, as transformers 4.57's pipeline does.

Long contexts are cut into overlapping windows. Per window: softmax of the start and of the end
logits over `[CLS]` and the context's tokens; a span's score is the product, for spans of at most
`max_answer_len` tokens. The best spans of all windows become text; spans with the same text (case
aside) are one answer, their scores added. The null score is start * end at `[CLS]`, the least over
the windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ft_handler.config import LARGEST_WHOLE, Flag, Settings, Whole, setting
from ft_handler.errors import ConfigError, RequestError, UnusableRequest
from ft_handler.tasks.answers import Answer, Wanted, Windows, best_answers, score_of
from ft_handler.tasks.base import Alias, AnyTask, Column, Head, Loaded, Runner, Task
from ft_handler.tasks.occlusion import (
    EXPLANATIONS,
    Explainable,
    Explained,
    OcclusionRunner,
    Part,
    Reason,
)
from ft_handler.tasks.windows import hold_windows, window_spans
from ft_handler.text.readers import Origins
from ft_handler.types import Encoding, Floats, Ids, Item, Outputs, Prediction

#: Bounds the table of spans that one question may ask for.
MOST_ANSWERS = 100
#: Of a question, where neither the settings nor the request say another number.
MOST_QUESTION_TOKENS = 64


def _at_least(low: int, high: int = LARGEST_WHOLE) -> Any:
    return Field(ge=low, le=high)


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class Parameters:
    """How one question is cut into windows and answered; lengths in tokens.

    doc_stride        tokens that neighbouring windows share; None is min(max_seq_len // 2, 128),
                      less where the question leaves too little
    max_question_len  None is 64, less where a window is short
    """

    top_k: Annotated[int, _at_least(1, MOST_ANSWERS)] = 1
    doc_stride: Annotated[int, _at_least(0)] | None = None
    max_answer_len: Annotated[int, _at_least(1)] = 15
    max_seq_len: Annotated[int, _at_least(4)] = 384
    max_question_len: Annotated[int, _at_least(1)] | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True


class QuestionSettings(Settings):
    """Defaults of the parameters."""

    top_k: Whole | None = setting(
        None,
        "How many answers: null or 1 gives the best one as an object, more a sorted list. A "
        "request may override it.",
        1,
    )
    doc_stride: Whole | None = setting(
        None,
        "Tokens shared by neighbouring windows of a long context; null is min(max_seq_len // 2, "
        "128), and at most three quarters of what the question leaves of a window. A request may "
        "override it.",
        0,
    )
    max_answer_len: Whole = setting(15, "Most tokens of an answer. A request may override it.", 1)
    max_seq_len: Whole | None = setting(
        None,
        "Most tokens of a window, question included; null is min(max_length, 384). A request may "
        "override it.",
        4,
    )
    max_question_len: Whole | None = setting(
        None,
        "Most tokens of a question; longer ones are cut. Null is 64, and at most three quarters of "
        "a window. A request may override it.",
        1,
    )
    handle_impossible_answer: Flag = setting(
        False, "Let the empty answer compete. A request may override it."
    )
    align_to_words: Flag = setting(True, "Widen answers to whole words. A request may override it.")


@plain_dataclass(slots=True)
class QuestionInput:
    """One question about one context."""

    question: str
    context: str
    params: Parameters

    @property
    def texts(self) -> tuple[str, ...]:
        """The question and its context."""
        return self.question, self.context


@plain_dataclass(slots=True, eq=False)
class QuestionEncoding(Encoding[QuestionInput]):
    """The windows of one question.

    origins   [tokens, 4] characters of the context: begin and end of each of its tokens, then of
              the word it belongs to
    first     where the context's tokens begin in every window: after `[CLS] question [SEP]`
    spans     the context's tokens [begin, end) in each window
    """

    origins: Origins
    first: int
    spans: list[tuple[int, int]]


def _most_of(tokens: int) -> int:
    """What a default may take where something else has to fit as well: three quarters."""
    return tokens * 3 // 4


class QuestionRunner(Explainable[QuestionInput, Parameters, QuestionEncoding]):
    """Questions to windows; start and end logits `[2, total]` of all windows to answers."""

    def __init__(self, settings: QuestionSettings, loaded: Loaded) -> None:
        self._reader, self._template = loaded.reader, loaded.template
        self._max_length = loaded.max_length
        self._least = loaded.template.pair_specials + 2
        self.longest = settings.max_seq_len or min(loaded.max_length, 384)
        if self.longest > loaded.max_length:
            raise ConfigError(
                f"setting 'max_seq_len' ({self.longest}) is over 'max_length' ({loaded.max_length})"
            )
        if self.longest < self._least:
            name = "max_length" if settings.max_seq_len is None else "max_seq_len"
            raise ConfigError(
                f"setting '{name}' ({self.longest}) leaves no room for a question and a context"
            )
        self.defaults = Parameters(
            top_k=settings.top_k or 1,
            doc_stride=settings.doc_stride,
            max_answer_len=settings.max_answer_len,
            max_seq_len=self.longest,
            max_question_len=settings.max_question_len,
            handle_impossible_answer=settings.handle_impossible_answer,
            align_to_words=settings.align_to_words,
        )
        self._default_room = self._question_room(self.defaults)

    def encode(self, items: Sequence[Item[QuestionInput]]) -> list[QuestionEncoding]:
        """The windows of every question; one whose parameters leave no room is refused."""
        # Both in one call: with few texts, how many calls there are is what costs.
        texts = [
            *(item.input.question for item in items), *(item.input.context for item in items)
        ]  # fmt: skip
        ids, origins = self._reader.located(texts)
        count = len(items)
        out: list[QuestionEncoding] = []
        for parts in zip(items, ids[:count], ids[count:], origins[count:], strict=True):
            try:
                out.append(self._windows(*parts))
            except RequestError as error:
                parts[0].result = error
        return out

    def _windows(
        self, item: Item[QuestionInput], question: Ids, context: Ids, origins: Origins
    ) -> QuestionEncoding:
        params, template = item.input.params, self._template
        longest = self._default_room
        if params is not self.defaults:
            longest = self._question_room(params)
        cut = len(question) > longest
        if cut:
            question = question[:longest]
        head = len(template.before) + len(question) + len(template.between)
        room = params.max_seq_len - head - len(template.after)
        if not len(context):
            raise UnusableRequest("'context' has no word the model could read")
        if room < 1:
            raise UnusableRequest(
                f"a window of {params.max_seq_len} tokens leaves none for the context: raise "
                "'max_seq_len' or lower 'max_question_len'"
            )
        if len(context) <= room:
            sequence = np.concatenate(
                (template.before, question, template.between, context, template.after)
            )
            split = template.split(len(question), len(sequence))
            spans = [(0, len(context))]
            return QuestionEncoding(item, [sequence], [split], cut, origins, head, spans)
        overlap = self._overlap(params, room)
        beside = head + len(template.after)
        hold_windows(len(context), room, overlap, beside, self.most_tokens, "doc_stride")
        spans = window_spans(len(context), room, overlap)
        sequences = [
            np.concatenate(
                (template.before, question, template.between, context[begin:end], template.after)
            )
            for begin, end in spans
        ]
        splits = [template.split(len(question), len(s)) for s in sequences]
        return QuestionEncoding(item, sequences, splits, cut, origins, head, spans)

    def _question_room(self, params: Parameters) -> int:
        """Most tokens of a question; raises UnusableRequest for a window that cannot be."""
        if params.max_seq_len > self._max_length:
            raise UnusableRequest(
                f"'max_seq_len' is {params.max_seq_len}, the model's limit is {self._max_length}"
            )
        if params.max_seq_len < self._least:
            raise UnusableRequest(
                f"'max_seq_len' is {params.max_seq_len}, a question and a context need at least "
                f"{self._least}"
            )
        if params.max_question_len is not None:
            return params.max_question_len
        texts = params.max_seq_len - self._template.pair_specials
        return min(MOST_QUESTION_TOKENS, max(1, _most_of(texts)))

    def _overlap(self, params: Parameters, room: int) -> int:
        """Tokens that windows of `room` share; raises UnusableRequest where they cannot."""
        if params.doc_stride is None:
            return min(params.max_seq_len // 2, 128, _most_of(room))
        if params.doc_stride >= room:
            raise UnusableRequest(
                f"the context needs several windows; one of {params.max_seq_len} tokens leaves "
                f"{room} for it, but 'doc_stride' has neighbours share {params.doc_stride}: raise "
                "'max_seq_len' or lower 'doc_stride' or 'max_question_len'"
            )
        return params.doc_stride

    def predict(self, encodings: Sequence[QuestionEncoding], outputs: Outputs) -> list[Prediction]:
        """`{"score", "start", "end", "answer"}`, or a list of them with `top_k` of 2 and more."""
        begins = np.cumsum(outputs.lengths) - outputs.lengths
        usual = encodings[0].item.input.params
        if all(e.item.input.params is usual for e in encodings):
            return self._group(usual, encodings, begins, outputs.values)
        groups: dict[Parameters, list[int]] = {}
        for i, encoding in enumerate(encodings):
            groups.setdefault(encoding.item.input.params, []).append(i)
        owners = np.repeat(np.arange(len(encodings)), [len(e.sequences) for e in encodings])
        predictions: list[Prediction] = [{}] * len(encodings)
        for params, members in groups.items():
            answers = self._group(
                params,
                [encodings[i] for i in members],
                begins[np.isin(owners, members)],
                outputs.values,
            )
            for i, answer in zip(members, answers, strict=True):
                predictions[i] = answer
        return predictions

    def _group(
        self,
        params: Parameters,
        questions: Sequence[QuestionEncoding],
        cls: NDArray[np.int64],
        logits: Floats,
    ) -> list[Prediction]:
        """Answers of questions with the same parameters; `cls` is where their windows begin."""
        counts = np.array([len(q.spans) for q in questions])
        windows = Windows(
            [q.item.input.context for q in questions],
            [q.origins for q in questions],
            counts,
            np.array([span for q in questions for span in q.spans]),
            cls,
            cls + np.repeat([q.first for q in questions], counts),
        )
        wanted = Wanted(params.top_k, params.max_answer_len, params.align_to_words)
        found, null = best_answers(logits, windows, wanted)
        if params.handle_impossible_answer:
            for answers, score in zip(found, null, strict=True):
                answers.append((score, 0, 0, ""))
                answers.sort(key=score_of, reverse=True)
        if params.top_k == 1:
            return [_answer(answers[0]) for answers in found]
        return [[_answer(a) for a in answers[: params.top_k]] for answers in found]

    def parts(self, encoding: QuestionEncoding) -> list[list[Part]]:
        """The question and a part of the context, in every window."""
        begin = len(self._template.before)
        question = Part(0, 0, encoding.first - len(self._template.between) - begin, begin)
        return [
            [question, Part(1, start, stop - start, encoding.first)]
            for start, stop in encoding.spans
        ]

    def explained(self, encoding: QuestionEncoding, outputs: Outputs) -> Explained:
        """The start and the end of the best answer, in the window where it is likeliest."""
        (prediction,) = self.predict([encoding], outputs)
        answer = prediction[0] if isinstance(prediction, list) else prediction
        window, start, end = self._tokens(encoding, outputs, answer)
        return Explained(
            answer,
            (window,),
            (
                Reason("importances_answer_start", "delta_start", 0, start),
                Reason("importances_answer_end", "delta_end", 1, end),
            ),
        )

    def _tokens(
        self, encoding: QuestionEncoding, outputs: Outputs, answer: Mapping[str, object]
    ) -> tuple[int, int, int]:
        """The window of an answer, and there its first and its last token."""
        params = encoding.item.input.params
        impossible = params.handle_impossible_answer and not answer["answer"]
        begins, ends = encoding.origins[:, [2, 3] if params.align_to_words else [0, 1]].T
        firsts = np.flatnonzero(begins == answer["start"])
        lasts = np.flatnonzero(ends == answer["end"])
        stops, first = np.cumsum(outputs.lengths), encoding.first
        found: list[tuple[float, int, int, int]] = []
        for window, (begin, stop) in enumerate(encoding.spans):
            at = stops[window] - outputs.lengths[window]
            context = outputs.values[:, at + first :][:, : stop - begin]
            # The empty answer lies at the first token, and is as likely as its least window says.
            allowed = np.column_stack((outputs.values[:, at], context))
            log_p = allowed - _log_sum_exp(allowed)
            if impossible:
                found.append((-float(log_p[:, 0].sum()), window, 0, 0))
                continue
            inside = [places[(places >= begin) & (places < stop)] for places in (firsts, lasts)]
            found += [
                (float(log_p[0, 1 + s] + log_p[1, 1 + e]), window, first + s, first + e)
                for s in (inside[0] - begin).tolist()
                for e in (inside[1] - begin).tolist()
                if s <= e
            ]
        _, window, start, end = max(found)
        return window, start, end


def _log_sum_exp(logits: Floats) -> Floats:
    """log(sum(exp(logits))) over the last axis, which stays; [rows, columns]."""
    top = logits.max(axis=1, keepdims=True)
    total: Floats = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return total


def _answer(found: Answer) -> dict[str, object]:
    score, begin, stop, text = found
    return {"score": score, "start": begin, "end": stop, "answer": text}


class QuestionAnswering(Task[QuestionInput, Parameters, QuestionEncoding, QuestionSettings]):
    """Extractive question answering."""

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    per_token = True
    labelled = False
    required = ("question", "context")
    ignored = ("target",)  # TorchServe's published sample has it
    parameters = Parameters
    aliases: ClassVar[Mapping[str, Alias]] = {"topk": Alias("top_k")}
    settings = QuestionSettings
    columns_of: ClassVar[Mapping[str, Column]] = {
        "answer": Column("BYTES", ""),
        "score": Column("FP32", 0.0),
        "start": Column("INT64", 0),
        "end": Column("INT64", 0),
    }
    measured_as = "spans"
    sample: ClassVar[Mapping[str, object]] = {
        "question": "When does the library open?",
        "context": "The town library opens at nine in the morning and closes at six.",
    }

    def head(self) -> Head:
        """Start and end logits of every token."""
        from ft_handler.model.heads import SpanHead

        return Head(SpanHead, {"qa_weight": "qa_outputs.weight", "qa_bias": "qa_outputs.bias"})

    def columns(self, config: Any) -> int:
        """Start and end."""
        return 2

    def read(self, texts: Mapping[str, Any], params: Parameters) -> QuestionInput:
        """A question and its context."""
        return QuestionInput(texts["question"], texts["context"], params)

    def spread(self, document: Mapping[str, object]) -> list[dict[str, object]] | None:
        """A list of questions about one context, or with as many contexts."""
        questions, contexts = document.get("question"), document.get("context")
        if not isinstance(questions, list):
            return None
        rest = {k: v for k, v in document.items() if k not in self.required}
        if not isinstance(contexts, list):
            contexts = [contexts] * len(questions)
        if len(contexts) != len(questions):
            raise UnusableRequest(
                f"there are {len(questions)} questions, but {len(contexts)} contexts"
            )
        return [
            {"question": question, "context": context, **rest}
            for question, context in zip(questions, contexts, strict=True)
        ]

    def runner(
        self, settings: QuestionSettings, loaded: Loaded
    ) -> Runner[QuestionInput, Parameters, Any]:
        """Windows of at most `max_seq_len` tokens."""
        return QuestionRunner(settings, loaded)

    def explanation(self) -> AnyTask:
        """What each word does for where the answer starts and ends."""
        return QuestionExplanation()


class QuestionExplanation(QuestionAnswering):
    """What each word of a question and its context does for where the answer starts and ends."""

    columns_of: ClassVar[Mapping[str, Column]] = {}
    answers_as = EXPLANATIONS

    def runner(
        self, settings: QuestionSettings, loaded: Loaded
    ) -> Runner[QuestionInput, Parameters, Any]:
        """One word after the other is left out."""
        return OcclusionRunner(self, QuestionRunner(settings, loaded), loaded)


TASK = QuestionAnswering()
