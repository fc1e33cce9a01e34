"""What sentence-transformers' files beside a checkpoint say of its embeddings.

`modules.json` lists the modules: the encoder, a pooling, perhaps a dense layer, perhaps a
normalisation. Each has a folder with its configuration. What is not served is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from ft_handler.errors import ModelError
from ft_handler.tasks.base import Files

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["cls", "mean", "max", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

_OURS = "sentence_transformers."
#: Keys of a pooling's configuration, true for those it uses -> their names, in sentence-
#: transformers' order.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_CURVES = ("Tanh", "Identity")
#: Names of the encoder's settings; older checkpoints have the architecture in it.
_ENCODER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer behind the pooling, then `curve`, "Tanh" or "Identity".

    weight  [outputs, inputs]
    bias    [outputs]
    """

    path: str
    curve: str
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Sentences:
    """How a checkpoint makes embeddings.

    prompts     name -> the text that is put before a client's
    longest     most tokens of a text; None where the files do not say
    lower_case  texts are lower-cased before the tokenizer sees them
    listed      whether there is a modules.json at all
    """

    pooling: Pooling
    normalize: bool
    dense: Dense | None
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    longest: int | None
    lower_case: bool
    listed: bool


def read_sentences(files: Files, pooling: Pooling | None, normalize: bool | None) -> Sentences:
    """What the files say; `pooling` and `normalize` win. Raises ModelError for what is not served.

    Without a modules.json it is the mean, not normalised, as in sentence-transformers.
    """
    modules = files.json("modules.json")
    found: Pooling = "mean"
    normalized, dense = False, None
    for kind, path in _modules(modules):
        config = _object(files, f"{path}/config.json") if path else {}
        match kind:
            case "Pooling":
                found = pooling or _pooling(config)
            case "Dense":
                dense = _dense(files, path, config)
            case "Normalize":
                _check_names(config, "Normalize")
                normalized = True
    encoder = next((c for name in _ENCODER_FILES if (c := _object(files, name))), {})
    _check_encoder(encoder)
    prompts, default = _prompts(_object(files, "config_sentence_transformers.json"))
    longest = encoder.get("max_seq_length")
    return Sentences(
        pooling=pooling or found,
        normalize=normalized if normalize is None else normalize,
        dense=dense,
        prompts=prompts,
        default_prompt_name=default,
        longest=longest if isinstance(longest, int) else None,
        lower_case=encoder.get("do_lower_case") is True,
        listed=modules is not None,
    )


def _object(files: Files, name: str) -> Mapping[str, Any]:
    """A file's object; empty where there is no such file."""
    found = files.json(name)
    if found is not None and not isinstance(found, dict):
        raise ModelError(f"its {name} is not a JSON object")
    return found or {}


def _modules(document: object) -> list[tuple[str, str]]:
    """Kind and folder of each module, checked to be those served in their order."""
    if document is None:
        return []
    try:
        found = [(str(m["type"]), str(m["path"])) for m in cast("list[dict[str, Any]]", document)]
    except (TypeError, KeyError):
        raise ModelError("its modules.json is not a list of modules") from None
    served = ["Transformer", "Pooling", "Dense", "Normalize"]
    modules = []
    for name, path in found:
        kind = name.rpartition(".")[2]
        if not name.startswith(_OURS) or kind not in (*served, "Dropout"):
            raise ModelError(f"its modules.json has a module {name}, which is not served")
        if kind == "Transformer" and path:
            raise ModelError(
                f"its encoder is in the folder {path}: trace that folder, with --pooling"
            )
        if kind != "Dropout":  # of training
            modules.append((kind, path))
    kinds = [kind for kind, _ in modules]
    if kinds != [kind for kind in served if kind in kinds] or kinds[:2] != served[:2]:
        raise ModelError(
            f"its modules.json chains {', '.join(kinds)}; served: {', '.join(served)}, of which "
            "the last two may be missing"
        )
    return modules


def _pooling(config: Mapping[str, Any]) -> Pooling:
    """The one pooling that a configuration names; raises ModelError for another or for several."""
    named = config.get("pooling_mode")
    if named is None:
        named = [mode for key, mode in _MODES.items() if config.get(key)] or ["mean"]
    modes = ["last" if mode == "lasttoken" else str(mode) for mode in _listed(named)]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ModelError(
            f"its pooling is {' and '.join(modes)}, which is not served; served: one of "
            f"{', '.join(POOLINGS)}"
        )
    if config.get("include_prompt") is False:
        raise ModelError("its pooling leaves prompts out (include_prompt), which is not served")
    return cast(Pooling, modes[0])


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_names(config: Mapping[str, Any], kind: str) -> None:
    """Refuse a module that reads or writes something else than the embedding."""
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise ModelError(f"its {kind} has {name} {config[name]!r}, which is not served")


def _dense(files: Files, path: str, config: Mapping[str, Any]) -> Dense:
    _check_names(config, "Dense")
    # sentence-transformers' own default.
    curve = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if curve not in _CURVES or config.get("use_residual"):
        also = " with a residual" if config.get("use_residual") else ""
        raise ModelError(
            f"its Dense has the activation {curve}{also}; served: {', '.join(_CURVES)}"
        )
    tensors = files.tensors(path)
    try:
        weight = tensors["linear.weight"].float()
    except KeyError:
        raise ModelError(f"its {path} has no linear.weight") from None
    bias = tensors.get("linear.bias", weight.new_zeros(len(weight))).float()
    return Dense(path, curve, weight, bias)


def _check_encoder(config: Mapping[str, Any]) -> None:
    """Refuse an encoder whose settings ask for more than its hidden states."""
    for name, served in (
        ("transformer_task", (None, "feature-extraction")),
        ("module_output_name", (None, "token_embeddings")),
        ("query_expansion", (None,)),
    ):
        if config.get(name) not in served:
            raise ModelError(f"its encoder has {name} {config[name]!r}, which is not served")


def _prompts(config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """The prompts by name, and the name of the one that is used by default."""
    kind = config.get("model_type")
    if kind not in (None, "SentenceTransformer"):
        raise ModelError(f"it is a {kind}, not a SentenceTransformer")
    prompts = {
        str(name): text
        for name, text in (config.get("prompts") or {}).items()
        if isinstance(text, str)
    }
    default = config.get("default_prompt_name")
    return prompts, default if default in prompts else None
