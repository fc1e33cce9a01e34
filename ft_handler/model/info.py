"""What a traced file says of itself."""

import dataclasses
import json
from dataclasses import dataclass

import torch

from ft_handler.errors import ModelError

FORMAT_VERSION = 1
METADATA_FILE = "ft_handler.json"
SEQUENCE_CLASSIFICATION = "sequence_classification"
QUESTION_ANSWERING = "question_answering"
MODES = (SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING)
DATA_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelInfo:
    """What a traced file says of itself; `remove_padding` is True for the fused model."""

    format_version: int
    mode: str
    architecture: str
    data_type: str
    model_type: str
    remove_padding: bool
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    vocab_size: int
    type_vocab_size: int
    num_labels: int
    labels: dict[int, str]
    problem_type: str | None
    do_lower_case: bool
    layer_norm_eps: float
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of the file's `ft_handler.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = METADATA_FILE) -> "ModelInfo":
        """Read metadata back; raises ModelError naming what is missing, unknown or mistyped."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{origin}: its metadata is not JSON") from error
        if not isinstance(raw, dict):
            raise ModelError(f"{origin}: its metadata is not a JSON object")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelError(
                f"{origin}: format version {version!r}; this package reads version "
                f"{FORMAT_VERSION}; trace the checkpoint again or install the matching ft-handler"
            )
        fields = {f.name for f in dataclasses.fields(cls)}
        if missing := sorted(fields - raw.keys()):
            raise ModelError(f"{origin}: its metadata lacks {', '.join(missing)}")
        if unknown := sorted(raw.keys() - fields):
            raise ModelError(f"{origin}: its metadata has unknown fields {', '.join(unknown)}")
        for name in _INTEGERS:
            if type(raw[name]) is not int or raw[name] < 0:
                raise ModelError(f"{origin}: {name} must be a whole number, not {raw[name]!r}")
        if raw["mode"] not in MODES:
            raise ModelError(f"{origin}: unknown mode {raw['mode']!r}")
        if raw["data_type"] not in DATA_TYPES:
            raise ModelError(f"{origin}: unknown data_type {raw['data_type']!r}")
        if raw["model_type"] not in ("ths", "thsext"):
            raise ModelError(f"{origin}: unknown model_type {raw['model_type']!r}")
        try:
            raw["labels"] = {int(k): str(v) for k, v in raw["labels"].items()}
        except (AttributeError, ValueError) as error:
            raise ModelError(f"{origin}: labels must map numbers to names") from error
        if sorted(raw["labels"]) != list(range(len(raw["labels"]))):
            raise ModelError(f"{origin}: labels must be numbered from 0 without gaps")
        return cls(**raw)


_INTEGERS = (
    "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions",
    "vocab_size", "type_vocab_size", "num_labels",
)  # fmt: skip
