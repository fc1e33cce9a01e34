"""What a task is: everything that one kind of model is asked and answers.

A task is one file with one object: its request keys and parameters, the settings it owns, how an
input becomes sequences, its head, what the head's outputs mean, and how they become predictions.
Tracing, archives, configuration, the request path and the servers ask the object and never name a
task. `ft_handler.tasks.register` makes one known.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from ft_handler.config import MOST_EXPLAINED_WORDS, SettingsT
from ft_handler.text.readers import Reader
from ft_handler.text.template import Template
from ft_handler.types import Encoding, InputT, Item, Outputs, Prediction

if TYPE_CHECKING:
    from ft_handler.model.heads import HeadModule
    from ft_handler.model.info import ModelInfo

ParamsT = TypeVar("ParamsT")
EncodingT = TypeVar("EncodingT", bound=Encoding[Any])


@dataclass(frozen=True)
class Head:
    """A head, and where its weights stand in a transformers state dict.

    module   the scriptable class (see `ft_handler.model.heads`), built with its weights as keyword
             arguments
    weights  the class's arguments -> names in the state dict; `{base}` stands for the encoder's
             own prefix there, such as "bert"
    outputs  the transformers module whose weight has a row an output, such as "classifier"; None
             when the number of outputs is fixed
    """

    module: type[HeadModule]
    weights: Mapping[str, str]
    outputs: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One field of predictions as an Open Inference tensor.

    datatype  the protocol's name, such as "BYTES" or "FP32"
    absent    what stands where a prediction has no such field
    """

    datatype: str
    absent: object


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker has loaded when it asks a task for a runner.

    labels      names of the outputs, numbered from 0; empty where they have none
    max_length  most tokens of a sequence
    mask        id of the token that stands for a word nobody sees; None where there is none
    most_words  of one input that are explained
    """

    info: ModelInfo
    labels: Mapping[int, str]
    reader: Reader
    template: Template
    max_length: int
    mask: int | None = None
    most_words: int = MOST_EXPLAINED_WORDS


class Runner(ABC, Generic[InputT, ParamsT, EncodingT]):
    """A task over one loaded model; safe from several threads.

    defaults  the parameters of a request that gives none
    longest   most tokens that a sequence has with those
    """

    defaults: ParamsT
    longest: int

    @abstractmethod
    def encode(self, items: Sequence[Item[InputT]]) -> list[EncodingT]:
        """Tokens of every item; one that cannot be encoded gets its error and is left out."""

    @abstractmethod
    def predict(self, encodings: Sequence[EncodingT], outputs: Outputs) -> list[Prediction]:
        """One prediction an encoding; `outputs` are those of their sequences, in their order."""


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a parameter, which loses where both are given.

    name    the parameter
    truths  what true and false mean for it; None: the value is the parameter's own
    """

    name: str
    truths: Mapping[bool, object] | None = None


class Task(ABC, Generic[InputT, ParamsT, EncodingT, SettingsT]):
    """One kind of model.

    name        the traced file's mode, and what `--mode` takes
    auto_class  the transformers class that loads such a checkpoint
    per_token   whether the head's outputs are for each token, else for each sequence
    labelled    whether outputs are labels with names; else there are `columns(config)` of them
    required    keys that a request's input must have; all values are texts
    optional    keys that it may have
    ignored     keys that are accepted and mean nothing
    bare        the key that a plain string stands for; None: an input is always an object
    parameters  what a request may say beside its input: a frozen pydantic dataclass
    nulls       what null means for a parameter; for every other one null is as good as absent
    aliases     other names of parameters
    listed      parameters of one text in `inputs`, which Hugging Face's clients want a list for,
                where neither the request nor the settings say otherwise
    settings    what the handler's configuration may say
    columns_of  prediction fields as Open Inference tensors, in their order; none where answers do
                not fit tensors
    answers_as  what KServe v1 calls the answers
    measured_as what `ft-handler verify` measures in answers, a family of its measures; None: they
                cannot be verified
    sample      a request that every model of the task can answer
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    per_token: ClassVar[bool]
    labelled: ClassVar[bool]
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[str | None] = None
    parameters: type[ParamsT]
    nulls: ClassVar[Mapping[str, object]] = {}
    aliases: ClassVar[Mapping[str, Alias]] = {}
    listed: ClassVar[Mapping[str, object]] = {}
    settings: type[SettingsT]
    columns_of: ClassVar[Mapping[str, Column]]
    answers_as: ClassVar[str] = "predictions"
    measured_as: ClassVar[str | None] = None
    sample: ClassVar[Mapping[str, str]]

    @abstractmethod
    def head(self) -> Head:
        """The head most architectures have; one with another says so in its own file."""

    def columns(self, config: Any) -> int:
        """Outputs a token or a sequence, of a transformers configuration."""
        return int(config.num_labels)

    @abstractmethod
    def read(self, texts: Mapping[str, str], params: ParamsT) -> InputT:
        """The input that a request's texts, by key, stand for."""

    def spread(self, document: Mapping[str, object]) -> list[dict[str, object]] | None:
        """The inputs of an object that holds several; None for an object that is one input."""
        return None

    @abstractmethod
    def runner(self, settings: SettingsT, loaded: Loaded) -> Runner[InputT, ParamsT, EncodingT]:
        """The task over a loaded model; raises ConfigError for settings the model contradicts."""

    def explanation(self) -> AnyTask | None:
        """The task of explaining this one's answers with the same model; None: there is none."""
        return None

    def sample_text(self) -> str:
        """The sample as the body of a plain-text request."""
        return self.sample[self.bare] if self.bare else json.dumps(self.sample)


#: A task whose inputs and parameters are of no concern.
AnyTask: TypeAlias = Task[Any, Any, Any, Any]
