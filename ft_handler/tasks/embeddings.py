"""One text as a vector, as sentence-transformers makes it: pooled hidden states, often normalised.

The traced file gives the pooled states as they are. Cutting to fewer dimensions and normalising
are done here, since a request may ask for either.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ft_handler.config import LARGEST_WHOLE, AnyCase, Flag, Settings, Text, Whole, setting
from ft_handler.errors import ConfigError, ModelError, UnusableRequest
from ft_handler.tasks.base import Alias, Body, Column, Files, Head, Loaded, Runner, Tailored, Task
from ft_handler.tasks.sentence_modules import POOLINGS, Dense, Pooling, read_sentences
from ft_handler.types import Encoding, Floats, Form, Ids, Item, Outputs, Prediction

if TYPE_CHECKING:
    from torch import Tensor

#: Below this length a vector is divided by it instead of by its own, as torch's normalize does.
_LEAST_LENGTH = np.float32(1e-12)


#: Of what a request may call the model.
_MOST_NAME_CHARS = 1024


def _is_encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class Parameters:
    """How one text is read, and what becomes of its vector.

    normalize             to length 1; None leaves the choice to the model
    dimensions            only the first so many, normalised afterwards; None is all of them
    prompt_name           the model's prompt to put before the text; None is the default one
    prompt                a prompt itself, which wins over the name; null is none at all
    truncation            whether too long a text is cut, else refused
    truncation_direction  which end of it is cut
    """

    normalize: bool | None = None
    dimensions: Annotated[int, Field(ge=1, le=LARGEST_WHOLE)] | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    truncation: bool = True
    truncation_direction: Annotated[Literal["right", "left"], AnyCase] = "right"


class EmbeddingSettings(Settings):
    """Defaults of the parameters."""

    truncation: Flag = setting(
        True,
        'Texts over `max_length`: true cuts them and says so (`"truncated": true`) where the '
        "answer has a place for it, false answers 422. A request may override it.",
    )
    normalize: Flag | None = setting(
        None,
        "Vectors of length 1; null does what the checkpoint's modules say. A request may override "
        "it.",
    )
    dimensions: Whole | None = setting(
        None,
        "Only the first so many of a vector, for models trained for that; null is all of them. A "
        "request may override it.",
        1,
    )
    prompt_name: Text | None = setting(
        None,
        "Which of the checkpoint's prompts stands before every text; null is its own default, "
        "which is mostly none. A request may override it.",
    )


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True, extra="ignore"))
class Chosen:
    """What of `ModelInfo.chosen` is needed to answer; the pooling is in the head already."""

    normalize: bool = False
    prompts: dict[str, str] = Field(default_factory=dict)
    default_prompt_name: str | None = None


@plain_dataclass(slots=True)
class TextInput:
    """One text."""

    text: str
    params: Parameters

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, without its prompt."""
        return (self.text,)


def normalized(vectors: Floats) -> Floats:
    """Vectors `[n, dimensions]` of length 1; those of length 0 stay."""
    lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    scaled: Floats = vectors / np.maximum(lengths, _LEAST_LENGTH)
    return scaled


class EmbeddingRunner(Runner[TextInput, Parameters, Encoding[TextInput]]):
    """Texts to sequences of at most `max_length` tokens; pooled states to vectors."""

    def __init__(self, settings: EmbeddingSettings, loaded: Loaded) -> None:
        chosen = Chosen(**loaded.info.chosen)
        self._prompts = chosen.prompts
        self._normalize = chosen.normalize
        self._columns = loaded.info.num_labels
        self._reader, self._template = loaded.reader, loaded.template
        self.longest = loaded.max_length
        self.defaults = Parameters(
            normalize=settings.normalize,
            dimensions=settings.dimensions,
            prompt_name=settings.prompt_name or chosen.default_prompt_name,
            truncation=settings.truncation,
        )
        self._room = self.longest - len(self._template.single_before)
        self._room -= len(self._template.single_after)
        if self._room < 1:
            raise ConfigError(f"setting 'max_length' ({self.longest}) leaves no room for text")
        try:
            self._prompted(TextInput("", self.defaults))
        except UnusableRequest as error:
            raise ConfigError(f"setting {error}") from None

    def encode(self, items: Sequence[Item[TextInput]]) -> list[Encoding[TextInput]]:
        """One sequence an item; an unknown prompt, and too long a text that may not be cut, are
        refused."""
        good, texts = [], []
        for item in items:
            try:
                texts.append(self._prompted(item.input))
                good.append(item)
            except UnusableRequest as error:
                item.result = error
        out: list[Encoding[TextInput]] = []
        for item, ids in zip(good, self._reader.ids(texts) if texts else (), strict=True):
            try:
                out.append(self._encoding(item, ids))
            except UnusableRequest as error:
                item.result = error
        return out

    def _prompted(self, given: TextInput) -> str:
        """The text behind its prompt; raises UnusableRequest for what this model does not have."""
        params = given.params
        if params.dimensions is not None and params.dimensions > self._columns:
            raise UnusableRequest(f"'dimensions' must be at most {self._columns}")
        if params.prompt is not None:
            return params.prompt + given.text
        if params.prompt_name is None:
            return given.text
        if params.prompt_name not in self._prompts:
            known = ", ".join(self._prompts)
            raise UnusableRequest(
                f"'prompt_name' must be one of {known}"
                if known
                else "'prompt_name' names nothing: this model has no prompts"
            )
        return self._prompts[params.prompt_name] + given.text

    def _encoding(self, item: Item[TextInput], ids: Ids) -> Encoding[TextInput]:
        params, over = item.input.params, len(ids) - self._room
        if over > 0:
            if not params.truncation:
                raise UnusableRequest(
                    f"the input has {self.longest + over} tokens, the limit is {self.longest} and "
                    "truncation is off"
                )
            ids = ids[over:] if params.truncation_direction == "left" else ids[: self._room]
        sequence = self._template.alone(ids)
        return Encoding(item, [sequence], [len(sequence)], over > 0)

    def predict(
        self, encodings: Sequence[Encoding[TextInput]], outputs: Outputs
    ) -> list[Prediction]:
        """`{"embedding": [dimensions] fp32, "tokens"}` an encoding."""
        groups: dict[tuple[bool, int | None], list[int]] = {}
        for i, encoding in enumerate(encodings):
            params = encoding.item.input.params
            normalize = self._normalize if params.normalize is None else params.normalize
            groups.setdefault((normalize, params.dimensions), []).append(i)
        predictions: list[Prediction] = [{}] * len(encodings)
        for (normalize, dimensions), members in groups.items():
            whole = len(members) == len(encodings)
            vectors = outputs.values if whole else outputs.values[members]
            vectors = vectors[:, :dimensions]
            if normalize:
                vectors = normalized(vectors)
            for i, vector in zip(members, vectors, strict=True):
                tokens = len(encodings[i].sequences[0])
                predictions[i] = {"embedding": vector, "tokens": tokens}
        return predictions


# -- bodies of other servers' clients ------------------------------------------------------------


def _fields(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", predictions)


class Vectors:
    """Text Embeddings Inference's answer, and the hub's: a list of vectors, whatever was asked."""

    many = True

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The vectors in the order of the texts."""
        return [p["embedding"] for p in _fields(predictions)]


class OneVector(Vectors):
    """The same for one text that came in no list."""

    many = False


@plain_dataclass(frozen=True, slots=True)
class OpenAI:
    """OpenAI's answer.

    model   what the request calls the model
    packed  vectors are base64 of little-endian fp32
    many    whether the texts came in a list
    """

    model: str
    packed: bool
    many: bool

    def document(self, predictions: Sequence[Prediction]) -> object:
        """The vectors, numbered, and how many tokens all texts had."""
        data, total = [], 0
        for index, found in enumerate(_fields(predictions)):
            entry = {"object": "embedding", "index": index, **found}
            total += entry.pop("tokens")
            if self.packed:
                vector = entry["embedding"].astype("<f4").tobytes()
                entry["embedding"] = base64.b64encode(vector).decode()
            data.append(entry)
        usage = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "data": data, "model": self.model, "usage": usage}


def _texts(value: object) -> Sequence[object]:
    """A text, or a list of them, as a list; raises UnusableRequest for token ids."""
    texts = value if isinstance(value, list) else [value]
    if any(type(i) is int for text in texts for i in (text if isinstance(text, list) else [text])):
        raise UnusableRequest("token ids are not accepted: send texts")
    return texts


def _openai(document: Mapping[str, object]) -> Body:
    """OpenAI's request; raises UnusableRequest."""
    rest = {k: v for k, v in document.items() if k not in ("input", "model", "user")}
    model = document.get("model") or ""
    if not isinstance(model, str) or len(model) > _MOST_NAME_CHARS or not _is_encodable(model):
        raise UnusableRequest(f"'model' must be a string of at most {_MOST_NAME_CHARS} characters")
    encoding = rest.pop("encoding_format", None) or "float"
    if encoding not in ("float", "base64"):
        raise UnusableRequest("'encoding_format' must be one of float, base64")
    given = document["input"]
    form = OpenAI(model, encoding == "base64", isinstance(given, list))
    return Body(_texts(given), rest, form)


# -- the task ------------------------------------------------------------------------------------


def pooled_by_torch(
    pooling: Pooling, dense: Dense | None, outputs: tuple[Tensor, ...], mask: Tensor
) -> tuple[Tensor]:
    """The head once more, over transformers' padded hidden states `[B,S,H]`, as a definition."""
    hidden, kept = outputs[0], mask.bool()[:, :, None]
    match pooling:
        case "cls":
            pooled = hidden[:, 0]
        case "last":
            last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
            pooled = hidden.gather(1, last)[:, 0]
        case "max":
            pooled = hidden.masked_fill(~kept, float("-inf")).amax(1)
        case _:
            pooled = (hidden * kept).sum(1) / kept.sum(1)
    if dense is None:
        return (pooled,)
    out = pooled @ dense.weight.t() + dense.bias
    return (out.tanh() if dense.curve == "Tanh" else out,)


class Embeddings(Task[TextInput, Parameters, Encoding[TextInput], EmbeddingSettings]):
    """A vector for a text."""

    name = "embeddings"
    auto_class = "AutoModel"
    per_token = False
    labelled = False
    required = ("text",)
    bare = "text"
    textual = ("prompt", "prompt_name")
    parameters = Parameters
    nulls: ClassVar[Mapping[str, object]] = {"prompt": ""}
    aliases: ClassVar[Mapping[str, Alias]] = {"truncate": Alias("truncation")}
    settings = EmbeddingSettings
    columns_of: ClassVar[Mapping[str, Column]] = {
        "embedding": Column("FP32", (), vector=True),
        "tokens": Column("INT64", 0),
    }
    measured_as = "vectors"
    sample: ClassVar[Mapping[str, object]] = {"text": "How far is the harbour from the station?"}

    def __init__(self, pooling: Pooling = "mean", dense: Dense | None = None) -> None:
        self._pooling: Pooling = pooling
        self._dense = dense

    def tailored(self, files: Files, wishes: Mapping[str, object]) -> Tailored:
        """Pooling, dense layer, normalisation, prompts and lengths as sentence-transformers'
        files say."""
        pooling = wishes.get("pooling")
        if pooling is not None and pooling not in POOLINGS:
            raise ModelError(f"--pooling is one of {', '.join(POOLINGS)}")
        found = read_sentences(
            files, cast("Pooling | None", pooling), cast("bool | None", wishes.get("normalize"))
        )
        chosen: dict[str, object] = {"pooling": found.pooling, "normalize": found.normalize}
        if found.prompts:
            chosen["prompts"] = dict(found.prompts)
        if found.default_prompt_name is not None:
            chosen["default_prompt_name"] = found.default_prompt_name
        said = [f"pooling {found.pooling}", "normalised" if found.normalize else "not normalised"]
        tensors: dict[str, Tensor] = {}
        if (dense := found.dense) is not None:
            said.insert(1, f"a dense layer to {len(dense.weight)} dimensions")
            tensors = {f"{dense.path}.weight": dense.weight, f"{dense.path}.bias": dense.bias}
        if found.prompts:
            said.append(f"prompts {', '.join(found.prompts)}")
        if found.default_prompt_name is not None:
            said.append(f"by default {found.default_prompt_name}")
        origin = "" if found.listed else " (there is no modules.json)"
        return Tailored(
            task=Embeddings(found.pooling, dense),
            chosen=chosen,
            tensors=tensors,
            longest=found.longest,
            lower_case=found.lower_case,
            notes=(f"embeddings: {', '.join(said)}{origin}",),
        )

    def columns(self, config: Any) -> int:
        """Dimensions of a vector."""
        if self._dense is None:
            return int(config.hidden_size)
        outputs, inputs = self._dense.weight.shape
        if inputs != config.hidden_size:
            raise ModelError(f"its Dense takes {inputs} inputs, the encoder has others")
        return int(outputs)

    def head(self) -> Head:
        """Pooling, then perhaps a dense layer."""
        from ft_handler.model.heads import VectorHead

        dense = self._dense
        if dense is None:
            weights, curved = {}, False
        else:
            source = f"{{base}}.{dense.path}"
            weights = {"dense_weight": f"{source}.weight", "dense_bias": f"{source}.bias"}
            curved = dense.curve == "Tanh"
        return Head(
            partial(VectorHead, pooling=self._pooling, curved=curved),
            weights,
            # Of segment_pool; picking rows takes no op of ours.
            op_interface=3 if self._pooling in ("mean", "max") else 2,
            expected=partial(pooled_by_torch, self._pooling, dense),
        )

    def read(self, texts: Mapping[str, Any], params: Parameters) -> TextInput:
        """A text."""
        return TextInput(texts["text"], params)

    def foreign(self, document: Mapping[str, object]) -> Body | None:
        """OpenAI's `input`, and `inputs` of texts as Text Embeddings Inference takes them."""
        if "input" in document:
            return _openai(document)
        given = document.get("inputs")
        if isinstance(given, str):
            form: Form = OneVector()
        elif isinstance(given, list) and not any(isinstance(text, dict) for text in given):
            form = Vectors()
        else:
            return None
        rest = {name: value for name, value in document.items() if name != "inputs"}
        return Body(_texts(given), rest, form)

    def runner(self, settings: EmbeddingSettings, loaded: Loaded) -> EmbeddingRunner:
        """Prompts and normalisation come from the traced file."""
        return EmbeddingRunner(settings, loaded)


TASK = Embeddings()
