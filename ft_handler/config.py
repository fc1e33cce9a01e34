"""Settings: read once, frozen, and strict about names; and every environment variable.

The `handler:` section of `model-config.yaml` is the place for settings; the older
`setup_config.json` is read as well. Both may be there when they agree. What a setting is, its
default and its bounds stand where it is used: here for every model, in a task's file for that task,
in a server's folder for that server. Settings and the parameters of requests are validated by the
same library, pydantic, and their mistakes are worded by the same function.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from ft_handler.errors import ConfigError
from ft_handler.files import CONFIG_FILE, OLDER_CONFIG_FILE, TOKENIZER_FILE, TRACED_FILE

#: Every environment variable of the package, and those of TorchServe it obeys, with the meaning.
ENVIRONMENT: Mapping[str, str] = {
    "FT_HANDLER_LIBRARY": "Path of libpyt_fastertransformer.so, tried before every other place.",
    "FT_HANDLER_CPU_ISA": "Instruction set of the CPU kernels (read by the library itself).",
    "FT_HANDLER_TF32": "1 lets fp32 products on a GPU use TF32 (read by the library itself).",
    "FT_HANDLER_TUNE": "Path of a GEMM table written by `ft-handler tune`.",
    "FT_HANDLER_SM90_GEMM": "0 leaves every product to cuBLASLt (read by the library itself).",
    "FT_HANDLER_SMALL": "0 turns the few-token encoder off (read by the library itself).",
    "FT_HANDLER_BATCH_INVARIANT": "1 does what the setting `batch_invariant` does, for a whole "
    "process (read by the library itself).",
    "FT_HANDLER_CUBLASLT": "A libcublasLt to try before torch's (read by the library itself).",
    "FT_HANDLER_MAX_RESPONSE_SIZE": "Set by `ft-handler serve` for its workers: the server's "
    "`max_response_size`.",
    "FT_HANDLER_SHARED": "Folder of optional development data for tests and benchmarks.",
    "TS_DECODE_INPUT_REQUEST": "TorchServe's: false hands JSON and text over as bytes.",
    "LOCAL_RANK": "TorchServe's: the rank of a worker process; only rank 0 answers.",
    "OTEL_TRACES_EXPORTER": "OpenTelemetry's: where spans go, such as `otlp`; unset or `none` is "
    "nowhere (docs/tracing.md).",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "OpenTelemetry's: `grpc` or `http/protobuf`, for `otlp`.",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "The same, for all that OpenTelemetry sends.",
}


def environment(name: str) -> str | None:
    """The value of one of the variables in `ENVIRONMENT`; None when unset or empty."""
    if name not in ENVIRONMENT:
        raise KeyError(name)
    return os.environ.get(name) or None


def limit_tokenizer_threads(threads: int) -> None:
    """Keep the tokenizer inside the worker's threads, unless its own variables already say so.

    The tokenizers library takes its number of threads from the environment alone.
    """
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    if threads == 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# -- how a value is read -------------------------------------------------------------------------


def spelled(value: object) -> object:
    """The truth value, null or whole number that a text spells; anything else as it is.

    Form fields are texts, and so are many values of older setup_config.json files.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    known = {"true": True, "false": False, "null": None}
    if text.lower() in known:
        return known[text.lower()]
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else value


def wording(error: ValidationError) -> list[tuple[str, str]]:
    """The mistakes as (name, what it must be); nothing of what was given is repeated."""
    return [
        (str(e["loc"][0]) if e["loc"] else "", _must(e["msg"], e["type"]))
        for e in error.errors(include_input=False, include_url=False)
    ]


def _must(message: str, kind: str) -> str:
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind in ("int_type", "int_from_float", "int_parsing"):
        return "must be an integer"
    if kind in ("bool_type", "bool_parsing"):
        return "must be true or false"
    if kind == "literal_error":
        return "must be one of " + message.partition("should be ")[2].replace("'", "").replace(
            " or ", ", "
        )
    if kind == "greater_than_equal":
        return "must be at least " + message.rpartition(" ")[2]
    if kind == "less_than_equal":
        return "must be at most " + message.rpartition(" ")[2]
    return message.replace("Input should", "must", 1).replace("must be a valid", "must be a", 1)


def _text(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("must be a non-empty string")
    return value


def _no_folder(value: str) -> str:
    if Path(value).name != value or value in (".", ".."):
        raise ValueError("must be the name of a file in the archive, without folders")
    return value


def _edges(value: object) -> object:
    if value is None:
        return None
    edges: list[int] = []
    for edge in value if isinstance(value, (list, tuple)) else ("",):
        edge = spelled(edge)
        if type(edge) is not int or edge <= max(edges, default=0):
            raise ValueError(
                "must be an ascending list of positive integers (an empty list: one bucket)"
            )
        edges.append(edge)
    return tuple(edges)


def _only(accepted: bool, why: str) -> AfterValidator:
    def check(value: bool) -> bool:
        if value is not accepted:
            raise ValueError(f"must be {str(accepted).lower()}: {why}")
        return value

    return AfterValidator(check)


#: Where the setting does not say otherwise.
MOST_EXPLAINED_WORDS = 256

#: What the setting `device` takes.
DEVICES = ("auto", "cpu", "cuda")

Text = Annotated[str, BeforeValidator(_text), AfterValidator(_not_empty)]
FileName = Annotated[Text, AfterValidator(_no_folder)]
Flag = Annotated[bool, BeforeValidator(spelled)]
Whole = Annotated[int, BeforeValidator(spelled)]
#: Put before a Literal: settings are read without regard to case.
AnyCase = BeforeValidator(_lower)
LARGEST_WHOLE = 2**31 - 1


def setting(default: Any, meaning: str, least: int | None = None, most: int | None = None) -> Any:
    """A field of `Settings`; where None is the default, `null` is allowed in the file.

    least, most  bounds of a whole number
    """
    most = most or (None if least is None else LARGEST_WHOLE)
    return Field(default, description=meaning, ge=least, le=most)


# -- the settings --------------------------------------------------------------------------------


class Settings(BaseModel):
    """Base of every group of settings; each field is a key of the `handler:` section."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", protected_namespaces=(), validate_default=False
    )


SettingsT = TypeVar("SettingsT", bound=Settings)


class CoreSettings(Settings):
    """What every model has settings for, whatever its task and whichever server runs it."""

    mode: Text | None = setting(
        None,
        "The model's task; null takes it from the traced file; another one must share its head "
        "with the file. In a setup_config.json it is informative: one that differs is noted in "
        "the log.",
    )
    model_file: FileName = setting(
        TRACED_FILE,
        "The traced model's file name in the archive; unset, an archive's manifest says it "
        "(`serializedFile`).",
    )
    tokenizer_file: FileName = setting(
        TOKENIZER_FILE,
        "The tokenizer's file name in the archive; when it is missing, `vocab.txt` is read, and "
        "without that what the traced file carries.",
    )
    do_lower_case: Flag | None = setting(
        None, "Lower-case the text before WordPiece; null keeps what the tokenizer's file says."
    )
    max_length: Whole | None = setting(
        None,
        "Most tokens of one sequence, special tokens included; null is the model's positions.",
        4,
    )
    length_buckets: Annotated[tuple[int, ...] | None, BeforeValidator(_edges)] = setting(
        None,
        "Upper edges, in tokens, of the length buckets; null derives them from the model's "
        "positions, an empty list makes one bucket.",
    )
    max_batch_tokens: Whole = setting(
        16384,
        "Most tokens the encoder gets at once; a longer batch runs in several parts. One sequence "
        "always runs, whatever its length.",
        1,
    )
    max_inputs_per_request: Whole = setting(
        2048,
        "Most inputs in one request's list; more answers 413. What they cost is bounded by "
        "`max_request_tokens`.",
        1,
    )
    max_request_tokens: Whole | None = setting(
        None,
        "Most tokens of one request, all its inputs and windows together; more answers 413. Null "
        "is `max_work_tokens`.",
        1,
    )
    max_work_tokens: Whole | None = setting(
        None,
        "Most tokens of all requests that the server hands over at once; beyond it the largest of "
        "them answer 503. Null is what the device computes in half of the archive's "
        "responseTimeout, as timed at warm-up; without warm-up there is no bound.",
        1,
    )
    max_text_chars: Whole = setting(250_000, "Most characters of one text; more answers 413.", 1)
    remember_chunks: Flag = setting(
        True,
        "Keep the tokens of what stands between blanks, where the tokenizer's words end there; "
        "false tokenizes every text afresh. The tokens are the same.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], AnyCase] = setting(
        "auto",
        "`auto` takes the GPU that TorchServe assigned, when it assigned one; `cpu` and `cuda` "
        "insist.",
    )
    num_threads: Whole | None = setting(
        None,
        "CPU threads of one worker's encoder (torch.set_num_threads); null leaves torch's choice.",
        1,
        4096,
    )
    warmup: Flag = setting(
        True, "Run sample batches at load, so that the first request is not slow."
    )
    cuda_graph_memory_mb: Whole = setting(
        1024, "Megabytes of GPU memory that captured CUDA graphs may take; 0 captures none.", 0
    )
    batch_invariant: Flag = setting(
        False,
        "Take every sum on a GPU in one order, so that hidden states do not depend on what shares "
        "the batch, at some cost in speed (docs/performance.md); needs an sm_90 GPU and fp16 or "
        "bf16. On a CPU they never do.",
    )
    server_timing: Flag = setting(
        True,
        "Say in the `Server-Timing` header of every reply how long its batch took "
        "(docs/tracing.md).",
    )
    # Names of the older setup_config.json, kept so that existing archives load.
    model_name: Text | None = setting(
        None, "Older name of the checkpoint; informative, the traced file decides."
    )
    num_labels: Whole | None = setting(
        None,
        "Number of labels; must agree with the traced file, where the task has labels. 0 says "
        "nothing, as in the published example.",
        0,
    )
    save_mode: Annotated[Literal["torchscript", "pretrained"] | None, AnyCase] = setting(
        None,
        "Older word for what the archive holds; the traced file is served whatever it says, and "
        "`pretrained` is noted in the log.",
    )
    captum_explanation: Flag = setting(
        False,
        "Answer `/explanations/NAME` and KServe's `:explain` (docs/explanations.md); false answers "
        "them 501.",
    )
    max_explained_words: Whole = setting(
        MOST_EXPLAINED_WORDS,
        "Most words of one input that are explained, each of which is one more sequence to "
        "compute; more answers 413.",
        1,
    )
    embedding_name: Text | None = setting(
        None, "Older name of the embedding layer for explanations; has no effect."
    )
    FasterTransformer: Annotated[Flag, _only(True, "the file holds nothing else")] = setting(
        True, "The fused ops; only true is accepted, the traced file holds nothing else."
    )
    BetterTransformer: Annotated[Flag, _only(False, "it belongs to another handler")] = setting(
        False, "An older handler's switch; only false is accepted."
    )
    model_parallel: Annotated[Flag, _only(False, "it belongs to another handler")] = setting(
        False, "An older handler's switch; only false is accepted."
    )


SECTION = "the handler section of model-config.yaml"


def model_yaml(folder: Path) -> Mapping[str, object]:
    """A folder's model-config.yaml, empty where there is none; raises ConfigError."""
    path = folder / CONFIG_FILE
    return parse_yaml(path.read_bytes(), str(path)) if path.is_file() else {}


def parse_yaml(text: bytes, origin: str) -> Mapping[str, object]:
    """The mapping that a YAML text holds; raises ConfigError, in which `origin` names the text."""
    import yaml  # commands that read none should not wait for it

    try:
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{origin} must hold a mapping")
    return loaded


#: Where settings come from that are no file's.
_ARGUMENTS = "the arguments"


class RawSettings:
    """Settings as they stand in files, not yet read; each group takes the names that it owns."""

    def __init__(
        self, sources: Mapping[str, Mapping[str, object]], older_mode: object = None
    ) -> None:
        """`sources` maps what a file is called in errors to its settings.

        older_mode  what setup_config.json calls the mode: informative, since the published
                    example prints one file for both of its models
        """
        self._sources = sources
        self.older_mode = older_mode

    @classmethod
    def of_model_dir(cls, model_dir: Path, model_yaml: Mapping[str, object] | None) -> RawSettings:
        """The yaml's `handler:` section and the folder's setup_config.json; raises ConfigError."""
        section = (model_yaml or {}).get("handler")
        if section is None:
            section = {}
        if not isinstance(section, Mapping):
            raise ConfigError("'handler' in model-config.yaml must be a mapping of settings")
        sources: dict[str, Mapping[str, object]] = {SECTION: section}
        path = model_dir / OLDER_CONFIG_FILE
        mode: object = None
        if path.is_file():
            try:
                older = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{OLDER_CONFIG_FILE} is not JSON: {error}") from None
            if not isinstance(older, Mapping):
                raise ConfigError(f"{OLDER_CONFIG_FILE} must hold an object")
            mode = older.get("mode")
            sources[OLDER_CONFIG_FILE] = {n: v for n, v in older.items() if n != "mode"}
        return cls(sources, mode)

    def over(self, given: Mapping[str, object]) -> RawSettings:
        """These settings, with `given` in the place of what files say of the same names."""
        rest = {
            where: {name: value for name, value in values.items() if name not in given}
            for where, values in self._sources.items()
        }
        arguments = {**rest.pop(_ARGUMENTS, {}), **given}
        return RawSettings({_ARGUMENTS: arguments, **rest}, self.older_mode)

    def read(self, group: type[SettingsT]) -> SettingsT:
        """The settings of one group. Raises ConfigError for wrong values and contradictions."""
        merged: dict[str, object] = {}
        told: dict[str, tuple[str, object]] = {}
        for where, values in self._sources.items():
            own = {name: v for name, v in values.items() if name in group.model_fields}
            read = _validated(group, own, where)
            for name in own:
                value = getattr(read, name)
                if name in told and told[name][1] != value:
                    raise ConfigError(
                        f"setting '{name}' is {told[name][1]!r} in {told[name][0]} but "
                        f"{value!r} in {where}"
                    )
                told[name] = where, value
            merged = {**own, **merged}
        return _validated(group, merged, " and ".join(self._sources))

    def refuse_unknown(
        self, groups: Iterable[type[Settings]], others: Mapping[str, type[Settings]]
    ) -> None:
        """Raise ConfigError for a name that no group in use owns.

        others  task -> its settings: a name of theirs is refused only where its value asks for
                something
        """
        known = {name for group in groups for name in group.model_fields}
        for where, values in self._sources.items():
            unknown = []
            for name in sorted(map(str, values.keys() - known)):
                owner = next((t for t, g in others.items() if name in g.model_fields), None)
                if owner is None:
                    unknown.append(name)
                    continue
                group = others[owner]
                if getattr(_validated(group, {name: values[name]}, where), name) != getattr(
                    group(), name
                ):
                    raise ConfigError(
                        f"setting '{name}' in {where} is for {owner}, but the traced file is for "
                        "another task"
                    )
            if unknown:
                raise ConfigError(
                    f"unknown setting{'s' * (len(unknown) > 1)} in {where}: "
                    + ", ".join(map(repr, unknown))
                )


def _validated(group: type[SettingsT], values: Mapping[str, object], where: str) -> SettingsT:
    try:
        return group(**values)
    except ValidationError as error:
        name, wanted = wording(error)[0]
        shown = repr(values.get(name))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(f"setting '{name}' in {where} {wanted}, not {shown}") from None


def settings_table(group: type[Settings]) -> list[tuple[str, object, str]]:
    """Every setting of a group as (name, default, meaning), in the order of the class."""
    return [(n, f.default, f.description or "") for n, f in group.model_fields.items()]
