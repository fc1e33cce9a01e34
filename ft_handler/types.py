"""The types that travel between stages: one type an arrow.

Incoming -decode-> Item -tokenize-> Encoding -bucket, pack-> PackedBatch
 -encoder and head-> logits -postprocess-> Prediction -assemble, encode-> Reply

An item that fails anywhere gets its error as its result and is skipped from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ft_handler.errors import RequestError

#: [tokens] ids of a text or a sequence.
Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]

#: One answer, ready for JSON: an object, or a list of them.
Prediction: TypeAlias = dict[str, object] | list[dict[str, object]]


class Incoming(NamedTuple):
    """One client's request as a server hands it over, not looked into yet.

    body    text, bytes, or what a JSON parser made of them; None when there is a form alone
    fields  the fields of a form, beside the body or alone: text, bytes or parsed JSON

    Of a body that is text or bytes, as the client declared it; None where it said nothing:

    content_type      the media type, with its charset
    content_encoding  how the bytes are compressed
    json_size         how many leading bytes are JSON; binary tensors follow
    """

    body: object = None
    fields: Mapping[str, object] = MappingProxyType({})
    content_type: str | None = None
    content_encoding: str | None = None
    json_size: int | None = None


class Trace(NamedTuple):
    """What ties one request to what others know of it.

    request_id   what the client, or the server for it, calls the request
    traceparent  the caller's span, as W3C's Trace Context writes it
    tracestate   what tracing systems say beside it
    arrived      when a server took the request in, in seconds as time.time() counts them
    """

    request_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    arrived: float | None = None


class Input(Protocol):
    """What a model is asked about: texts, and the parameters that go with them."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that has to be tokenized."""


InputT = TypeVar("InputT", bound=Input)


@dataclass(slots=True, eq=False)
class Item(Generic[InputT]):
    """One input on its way.

    request   which request of the batch it belongs to
    position  among that request's inputs
    result    set once, by the stage that answers or refuses it
    """

    request: int
    position: int
    input: InputT
    result: Prediction | RequestError | None = None


@dataclass(slots=True, eq=False)
class Encoding(Generic[InputT]):
    """An item as the model's tokens: one sequence or several.

    sequences  token ids of each sequence, special tokens included
    splits     how many leading tokens of each sequence have token type 0
    truncated  something of the client's text was cut
    """

    item: Item[InputT]
    sequences: list[Ids]
    splits: list[int]
    truncated: bool


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


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the model gave for some sequences.

    values   one row a sequence, [sequences, columns]; or one column a token, [columns, total]
    lengths  [sequences] tokens of each
    """

    values: Floats
    lengths: NDArray[np.int64]


class Form(Protocol):
    """How one request's predictions become a document."""

    @property
    def many(self) -> bool:
        """Whether the request is a list, so that messages name the input they mean."""

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The answer's body, ready for JSON."""


class Reply(NamedTuple):
    """What goes back to one client.

    headers  further headers of the answer, for servers that can send them
    error    the type of error it is; empty for an answer
    """

    status: int
    reason: str
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = MappingProxyType({})
    error: str = ""
