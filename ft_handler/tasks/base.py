"""What a task is: everything that one kind of model is asked and answers.

A task is one file with one object: its request keys and parameters, the settings it owns, how an
input becomes sequences, its head, what the head's outputs mean, and how they become predictions.
Tracing, archives, configuration, the request path and the servers ask the object and never name a
task. `ft_handler.tasks.register` makes one known.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from ft_handler.config import MOST_EXPLAINED_WORDS, SettingsT
from ft_handler.errors import ModelError
from ft_handler.text.pieces import Pieces
from ft_handler.text.readers import Reader
from ft_handler.text.template import Template
from ft_handler.types import Encoding, Form, InputT, Item, Outputs, Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from ft_handler.model.heads import HeadModule
    from ft_handler.model.info import ModelInfo

ParamsT = TypeVar("ParamsT")
EncodingT = TypeVar("EncodingT", bound=Encoding[Any])


@dataclass(frozen=True)
class Head:
    """A head, and where its weights stand in a transformers state dict.

    module    makes the scriptable module (see `ft_handler.model.heads`) of its weights, which are
              keyword arguments
    weights   these arguments -> names in the state dict; `{base}` stands for the encoder's own
              prefix there, such as "bert"
    outputs   the transformers module whose weight has a row an output, such as "classifier"; None
              when the number of outputs is fixed
    expected  makes of transformers' outputs in fp32, and of the mask `[B,S]`, what the head's
              `padded` answers; None where that is transformers' own answer
    op_interface  the least interface of the library's ops that the module's own calls need
    """

    module: Callable[..., HeadModule]
    weights: Mapping[str, str]
    outputs: str | None = None
    op_interface: int = 2
    expected: Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One field of predictions as an Open Inference tensor.

    datatype  the protocol's name, such as "BYTES" or "FP32"
    absent    what stands where a prediction has no such field
    vector    whether the field is a list, in all predictions of one length
    optional  left out where no prediction has the field and nobody asked for it
    """

    datatype: str
    absent: object
    vector: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a worker has loaded when it asks a task for a runner.

    labels      names of the outputs, numbered from 0; empty where they have none
    max_length  most tokens of a sequence
    pieces      what the tokens spell
    mask        id of the token that stands for a word nobody sees; None where there is none
    most_words  of one input that are explained
    """

    info: ModelInfo
    labels: Mapping[int, str]
    reader: Reader
    template: Template
    max_length: int
    pieces: Pieces
    mask: int | None = None
    most_words: int = MOST_EXPLAINED_WORDS


class Runner(ABC, Generic[InputT, ParamsT, EncodingT]):
    """A task over one loaded model; safe from several threads.

    defaults    the parameters of a request that gives none
    longest     most tokens that a sequence has with those
    most_texts  of a list in an input; None is as many as a request may have inputs
    most_tokens  of one input's sequences, as far as they are known before they are made; None is no
                 bound
    """

    defaults: ParamsT
    longest: int
    most_texts: int | None = None
    most_tokens: int | None = None

    def bound(self, most_tokens: int | None) -> None:
        """Say how many tokens one input may ask for, before the first batch."""
        self.most_tokens = most_tokens

    @abstractmethod
    def encode(self, items: Sequence[Item[InputT]]) -> list[EncodingT]:
        """Tokens of every item; one that cannot be encoded gets its error and is left out."""

    @abstractmethod
    def predict(self, encodings: Sequence[EncodingT], outputs: Outputs) -> list[Prediction]:
        """One prediction an encoding; `outputs` are those of their sequences, in their order."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request as clients of another server write it, understood.

    inputs      each an input as any other body has it: a text, or an object with the task's keys
    parameters  for all of them, by any of their names
    form        what these clients are answered
    """

    inputs: Sequence[object]
    parameters: Mapping[str, object]
    form: Form


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of a parameter, which loses where both are given.

    name    the parameter
    truths  what true and false mean for it; None: the value is the parameter's own
    """

    name: str
    truths: Mapping[bool, object] | None = None


class Files(Protocol):
    """What lies beside a checkpoint's configuration and the encoder's weights."""

    def json(self, name: str) -> Any:
        """What a JSON file holds, None where there is none; raises ModelError."""

    def tensors(self, folder: str) -> Mapping[str, Tensor]:
        """The weights in a folder of the checkpoint; raises ModelError where there are none."""


class Task(ABC, Generic[InputT, ParamsT, EncodingT, SettingsT]):
    """One kind of model.

    name        the traced file's mode, and what `--mode` takes
    auto_class  the transformers class that loads such a checkpoint; tasks of one class share their
                heads, so that a file traced for one serves another when the setting `mode` says so
    per_token   whether the head's outputs are for each token, else for each sequence
    labelled    whether outputs are labels with names; else there are `columns(config)` of them
    required    keys that a request's input must have; their values are texts
    optional    keys that it may have
    lists       keys and parameters whose values are lists of texts
    separator   what parts the texts of a list that is written as one text; None: a list is a list
    synonyms    other names of keys; `read` gets the texts under the name that was used
    textual     parameters whose values are texts, checked as those of keys are
    ignored     keys that are accepted and mean nothing
    bare        the key that a plain string stands for; None: an input is always an object
    nested      whether the answers to one text in `inputs` are a list in a list, as the hub has it
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
    lists: ClassVar[tuple[str, ...]] = ()
    separator: ClassVar[str | None] = None
    synonyms: ClassVar[Mapping[str, str]] = {}
    textual: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()
    bare: ClassVar[str | None] = None
    nested: ClassVar[bool] = False
    parameters: type[ParamsT]
    nulls: ClassVar[Mapping[str, object]] = {}
    aliases: ClassVar[Mapping[str, Alias]] = {}
    listed: ClassVar[Mapping[str, object]] = {}
    settings: type[SettingsT]
    columns_of: ClassVar[Mapping[str, Column]]
    answers_as: ClassVar[str] = "predictions"
    measured_as: ClassVar[str | None] = None
    sample: ClassVar[Mapping[str, object]]

    @abstractmethod
    def head(self) -> Head:
        """The head most architectures have; one with another says so in its own file."""

    def tailored(self, files: Files, wishes: Mapping[str, object]) -> Tailored:
        """The task as a checkpoint's files have it.

        wishes  option of `ft-handler trace` -> its value, which wins over what the files say

        Raises ModelError for what is not served.
        """
        for name in wishes:
            raise ModelError(f"--{name} is not for {self.name}")
        return Tailored(self)

    def columns(self, config: Any) -> int:
        """Outputs a token or a sequence, of a transformers configuration."""
        return int(config.num_labels)

    @abstractmethod
    def read(self, texts: Mapping[str, Any], params: ParamsT) -> InputT:
        """The input that a request's texts, by key, stand for: a string each, a tuple for `lists`.

        Raises RequestError where they and the parameters do not fit each other.
        """

    def foreign(self, document: Mapping[str, object]) -> Body | None:
        """What a body of another server's clients means; None for one that is none.

        Raises RequestError.
        """
        return None

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
        return str(self.sample[self.bare]) if self.bare else json.dumps(self.sample)


#: A task whose inputs and parameters are of no concern.
AnyTask: TypeAlias = Task[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class Tailored:
    """A task as one checkpoint has it.

    task        the task with the checkpoint's own head
    chosen      what the traced file then says of the choices, in JSON's types; `Task.runner` finds
                it in `ModelInfo.chosen`
    tensors     weights of the head that transformers does not read, by their names in the state
                dict of an encoder alone
    longest     most tokens that a text should have; None leaves it to the tokenizer
    lower_case  whether texts are lower-cased before the tokenizer sees them
    notes       what was chosen, in words
    """

    task: AnyTask
    chosen: Mapping[str, object] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    longest: int | None = None
    lower_case: bool = False
    notes: tuple[str, ...] = ()
