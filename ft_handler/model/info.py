"""What a traced file says of itself.

Two numbers, and what they promise:

- `format_version` changes only when an older reader would answer wrongly. Fields may be added
  without it: a reader ignores those it does not know and gives those that are missing their
  defaults. Older versions are read for as long as their files can be served.
- `op_interface` says which of the library's op interfaces the module calls; files of before the
  field call the first.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ft_handler import precisions
from ft_handler.errors import ModelError
from ft_handler.files import METADATA_FILE

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True))
class QuantizedInfo:
    """What a traced file of quantised products says of them.

    kept      products that are floats all the same, such as "layers.3.down"
    chosen    on what it was measured which ones those are: "texts", "random tokens", or "wish"
    error     the root mean square of the outputs' differences from fp32 there, as a part of that of
              the outputs (of logits at least 1)
    half      whether the model stays within fp16, in which GPUs compute the file
    """

    kept: list[str]
    chosen: Literal["texts", "random tokens", "wish"]
    error: float
    half: bool


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="ignore", strict=True))
class ModelInfo:
    """What a traced file says of itself.

    mode            the task's name
    architecture    transformers' `model_type`
    data_type       the precision's name
    model_type      "thsext" for the fused model, "ths" for transformers' own as TorchScript
    remove_padding  True for the fused model
    max_positions   most tokens of a sequence
    num_labels      outputs a sequence, or a token
    labels          the outputs' names, or none
    op_interface    which interface of the library the module calls
    function_to_apply  what the checkpoint's configuration makes of logits; None leaves the choice
                       to the task
    chosen          what the task read in the checkpoint's files and needs to answer, its own to
                    interpret
    checkpoint      the hub's name of what was traced; None where it was a folder
    adapter         the name of the adapter's folder, if one was merged
    quantized       of a precision with quantised products
    """

    format_version: int
    mode: str
    architecture: str
    data_type: str
    model_type: Literal["ths", "thsext"]
    remove_padding: bool
    hidden_size: NonNegativeInt
    num_layers: NonNegativeInt
    num_heads: NonNegativeInt
    intermediate_size: NonNegativeInt
    max_positions: NonNegativeInt
    vocab_size: NonNegativeInt
    type_vocab_size: NonNegativeInt
    num_labels: NonNegativeInt
    labels: dict[int, str]
    problem_type: str | None
    do_lower_case: bool
    layer_norm_eps: float
    versions: dict[str, str]
    op_interface: int = 1
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    adapter: str | None = None
    quantized: QuantizedInfo | None = None

    def to_json(self) -> str:
        """The text of the file's `ft_handler.json`."""
        return _READER.dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = METADATA_FILE) -> ModelInfo:
        """Read metadata back; raises ModelError naming what is missing or mistyped."""
        try:
            version = _VERSION.validate_json(text).format_version
            if version is not None and not 1 <= version <= FORMAT_VERSION:
                raise ModelError(
                    f"{origin}: format version {version}; this package reads versions 1 to "
                    f"{FORMAT_VERSION}; trace the checkpoint again or install the matching "
                    "ft-handler"
                )
            info = _READER.validate_json(text)
        except ValidationError as error:
            raise ModelError(f"{origin}: {_in_words(error)}") from None
        try:
            precisions.get(info.data_type)
        except ModelError as error:
            raise ModelError(f"{origin}: {error}") from None
        if sorted(info.labels) != list(range(len(info.labels))):
            raise ModelError(f"{origin}: labels must be numbered from 0 without gaps")
        return info


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class _Version:
    """The one field that is read first: what the others mean depends on it."""

    format_version: int | None = None


_VERSION = TypeAdapter(_Version)
_READER = TypeAdapter(ModelInfo)


def _in_words(error: ValidationError) -> str:
    """The first of what is wrong with metadata, and every missing field."""
    problems = error.errors(include_url=False)
    missing = sorted(str(p["loc"][0]) for p in problems if p["type"] == "missing")
    if missing:
        return f"its metadata lacks {', '.join(missing)}"
    first = problems[0]
    if first["type"] == "json_invalid":
        return "its metadata is not JSON"
    if not first["loc"]:
        return "its metadata is not a JSON object"
    field = str(first["loc"][0])
    return f"{field} {first['msg'].replace('Input should be', 'must be')}, not {first['input']!r}"
