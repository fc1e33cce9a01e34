"""Inputs to token sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from ft_handler.errors import ConfigError, RequestError, UnusableRequest
from ft_handler.text.chunks import reader_of
from ft_handler.text.readers import Ids, Origins
from ft_handler.text.template import Template, longest_first
from ft_handler.types import (
    Encoding,
    ModelInput,
    QuestionInput,
    QuestionParams,
    QuestionWindows,
    TextInput,
)


def window_spans(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Windows [begin, end) of at most `room` tokens; neighbours share `overlap` tokens."""
    spans = []
    for begin in range(0, max(tokens, 1), room - overlap):
        end = min(begin + room, tokens)
        spans.append((begin, end))
        if end == tokens:
            break
    return spans


class TextEncoder:
    """Tokenizes texts and pairs for classification."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._reader = reader_of(tokenizer)
        self._max_length = max_length
        self._template = Template(tokenizer)
        if max_length <= self._template.pair_specials:
            raise ConfigError(f"setting 'max_length' ({max_length}) leaves no room for text")

    def encode(self, inputs: Sequence[ModelInput]) -> list[Encoding | RequestError]:
        """One Encoding an input, or the error (422) that takes it out of the flow."""
        texts = [i for i in inputs if isinstance(i, TextInput)]
        firsts = self._reader.ids([t.text for t in texts])
        pairs = [t.text_pair for t in texts if t.text_pair is not None]
        seconds = iter(self._reader.ids(pairs) if pairs else ())
        template = self._template
        before, after = template.single_before, template.single_after
        room = self._max_length - len(before) - len(after)
        out: list[Encoding | RequestError] = []
        for text, ids in zip(texts, firsts, strict=True):
            if text.text_pair is not None:
                out.append(self._pair(text, ids, next(seconds)))
                continue
            count = len(ids)
            if count > room:
                if not text.params.truncation:
                    out.append(self._too_long(count + len(before) + len(after)))
                    continue
                ids = ids[:room]
            sequence = np.concatenate((before, ids, after))
            out.append(Encoding([sequence], [len(sequence)], count > room))
        return out

    def _too_long(self, count: int) -> RequestError:
        return UnusableRequest(
            f"the input has {count} tokens, the limit is {self._max_length} and truncation is off"
        )

    def _pair(self, text: TextInput, first: Ids, second: Ids) -> Encoding | RequestError:
        template = self._template
        count = len(first) + len(second)
        room = self._max_length - template.pair_specials
        if count > room:
            if not text.params.truncation:
                return self._too_long(count + template.pair_specials)
            keep_first, keep_second = longest_first(len(first), len(second), room)
            first, second = first[:keep_first], second[:keep_second]
        sequence = np.concatenate(
            (template.before, first, template.between, second, template.after)
        )
        return Encoding([sequence], [template.split(len(first), len(sequence))], count > room)


class QuestionEncoder:
    """Tokenizes questions with their contexts, in overlapping windows where they are long."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._reader = reader_of(tokenizer)
        self._max_length = max_length
        self._template = Template(tokenizer)

    def encode(self, inputs: Sequence[ModelInput]) -> list[Encoding | RequestError]:
        """One Encoding an input, or the error (422) that takes it out of the flow."""
        questions = [i for i in inputs if isinstance(i, QuestionInput)]
        # Both in one call: with few texts, how many calls there are is what costs.
        texts = [*(q.question for q in questions), *(q.context for q in questions)]
        ids, origins = self._reader.located(texts)
        count = len(questions)
        out: list[Encoding | RequestError] = []
        for parts in zip(questions, ids[:count], ids[count:], origins[count:], strict=True):
            try:
                out.append(self._windows(*parts))
            except RequestError as error:
                out.append(error)
        return out

    def _windows(
        self, item: QuestionInput, question: Ids, context: Ids, origins: Origins
    ) -> Encoding:
        params, template = item.params, self._template
        cut = len(question) > params.max_question_len
        question = question[: params.max_question_len]
        head = len(template.before) + len(question) + len(template.between)
        overlap = params.doc_stride
        if overlap is None:
            overlap = min(params.max_seq_len // 2, 128)
        room = self._room(params, head, overlap)
        if not len(context):
            raise UnusableRequest("'context' has no word the model could read")
        spans = window_spans(len(context), room, overlap)
        sequences = [
            np.concatenate(
                (template.before, question, template.between, context[begin:end], template.after)
            )
            for begin, end in spans
        ]
        splits = [template.split(len(question), len(s)) for s in sequences]
        windows = QuestionWindows(item.context, origins, head, spans)
        return Encoding(sequences, splits, cut, windows)

    def _room(self, params: QuestionParams, head: int, overlap: int) -> int:
        """Context tokens a window has; raises UnusableRequest when the settings leave none."""
        if params.max_seq_len > self._max_length:
            raise UnusableRequest(
                f"'max_seq_len' is {params.max_seq_len}, the model's limit is {self._max_length}"
            )
        room = params.max_seq_len - head - len(self._template.after)
        if room <= overlap:
            raise UnusableRequest(
                f"a window of {params.max_seq_len} tokens leaves {max(room, 0)} for the context, "
                f"but neighbouring windows share {overlap}: raise 'max_seq_len' or lower "
                "'doc_stride' or 'max_question_len'"
            )
        return room
