"""The types that travel between stages: one type an arrow.

bytes -decode-> Request -tokenize-> Encoding -bucket-> [Encoding] -pack-> PackedBatch
 -encoder and head-> logits -postprocess-> Prediction -encode-> response
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ClassificationParams:
    """How one text is cut and scored.

    top_k     None gives the best label as an object; 0 gives every label as a list, a positive
              number that many
    function  "softmax", "sigmoid" or "none"; None leaves the choice to the model
    """

    top_k: int | None
    function: str | None
    truncation: bool


@dataclass(frozen=True, slots=True)
class QuestionParams:
    """How one question is cut into windows and answered; lengths in tokens.

    doc_stride  tokens that neighbouring windows share; None is min(max_seq_len // 2, 128)
    """

    top_k: int
    doc_stride: int | None
    max_answer_len: int
    max_seq_len: int
    max_question_len: int
    handle_impossible_answer: bool
    align_to_words: bool


@dataclass(slots=True)
class TextInput:
    """One text, or a pair, to classify."""

    text: str
    text_pair: str | None
    params: ClassificationParams


@dataclass(slots=True)
class QuestionInput:
    """One question about one context."""

    question: str
    context: str
    params: QuestionParams


ModelInput: TypeAlias = TextInput | QuestionInput


@dataclass(slots=True)
class Request:
    """One client's request: its inputs, and the shape its answer takes.

    form    "single", "list", "instances" (KServe v1) or "v2" (Open Inference Protocol)
    id      the v2 request's id
    outputs the v2 outputs asked for; None is all of them
    """

    inputs: Sequence[ModelInput]
    form: str = "single"
    id: str | None = None
    outputs: tuple[str, ...] | None = None


@dataclass(slots=True)
class QuestionWindows:
    """What the windows of one question mean.

    text      the client's own context
    origins   [tokens, 4] characters of `text`: begin and end of each of the context's tokens, then
              of the word it belongs to
    first     where the context's tokens begin in every window: after `[CLS] question [SEP]`
    spans     the context's tokens [begin, end) in each window
    """

    text: str
    origins: NDArray[np.int32]
    first: int
    spans: list[tuple[int, int]]


@dataclass(slots=True)
class Encoding:
    """One input as the model's tokens: a single sequence, or the windows of a question.

    sequences  token ids of each sequence, special tokens included
    splits     how many leading tokens of each sequence have token type 0
    truncated  something of the client's text was cut
    windows    question answering only
    """

    sequences: list[NDArray[np.int64]]
    splits: list[int]
    truncated: bool
    windows: QuestionWindows | None = None


#: One answer, ready for JSON: an object, or a list of them.
Prediction: TypeAlias = dict[str, Any] | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back to one client."""

    status: int
    reason: str
    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences laid end to end, without a pad: what the encoder eats.

    input_ids       [total] int64
    token_type_ids  [total] int64
    cu_seqlens      [batch + 1] int32, cu_seqlens[0] == 0, cu_seqlens[-1] == total
    max_seqlen      the longest length, counted on the host
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.cu_seqlens) - 1

    @property
    def total(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)
