"""Settings: read once from the archive and the environment, frozen, and strict about names.

The `handler:` section of `model-config.yaml` is the place for them; the older
`setup_config.json` is read as well. Both may be there when they agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ft_handler.errors import ConfigError

MODES = ("sequence_classification", "question_answering")
FUNCTIONS = ("softmax", "sigmoid", "none")
DEVICES = ("auto", "cpu", "cuda")

#: Every environment variable of the package, and those of TorchServe it obeys, with the meaning.
ENVIRONMENT: Mapping[str, str] = {
    "FT_HANDLER_LIBRARY": "Path of libpyt_fastertransformer.so, tried before every other place.",
    "FT_HANDLER_CPU_ISA": "Instruction set of the CPU kernels (read by the library itself).",
    "FT_HANDLER_TF32": "1 lets fp32 products on a GPU use TF32 (read by the library itself).",
    "FT_HANDLER_TUNE": "Path of a GEMM table written by `ft-handler tune`.",
    "FT_HANDLER_SM90_GEMM": "0 leaves every product to cuBLASLt (read by the library itself).",
    "FT_HANDLER_SMALL": "0 turns the few-token encoder off (read by the library itself).",
    "FT_HANDLER_BATCH_INVARIANT": "1: the setting `batch_invariant` (read by the library itself).",
    "FT_HANDLER_CUBLASLT": "A libcublasLt to try before torch's (read by the library itself).",
    "FT_HANDLER_SHARED": "Folder of optional development data for tests and benchmarks.",
    "TS_DECODE_INPUT_REQUEST": "TorchServe's: false hands JSON and text over as bytes.",
    "LOCAL_RANK": "TorchServe's: the rank of a worker process; only rank 0 answers.",
}


def environment(name: str) -> str | None:
    """The value of one of the variables in `ENVIRONMENT`; None when unset or empty."""
    if name not in ENVIRONMENT:
        raise KeyError(name)
    return os.environ.get(name) or None


def limit_tokenizer_threads(threads: int) -> None:
    """Keep the tokenizer inside the worker's threads, unless its own variables already say so."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    if threads == 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def leave_out_few_token_encoder() -> None:
    """Send few tokens through the general GPU path too; before the library's first forward."""
    os.environ["FT_HANDLER_SMALL"] = "0"


def keep_results_batch_invariant() -> None:
    """Make a sequence's results on a GPU independent of its batch; before the first forward."""
    os.environ["FT_HANDLER_BATCH_INVARIANT"] = "1"


# -- how a value is read -------------------------------------------------------------------------


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise ValueError("true or false")


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            bound = f"an integer of at least {low}"
            raise ValueError(bound if high == 2**31 - 1 else f"{bound} and at most {high}")
        return value

    return read


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value.strip()


def _file_name(value: object) -> str:
    name = _text(value)
    if Path(name).name != name or name in (".", ".."):
        raise ValueError("the name of a file in the archive, without folders")
    return name


def _one_of(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        # YAML reads a bare `none` as a string but `null` as None.
        if isinstance(value, str) and value.strip().lower() in choices:
            return value.strip().lower()
        raise ValueError("one of " + ", ".join(choices))

    return read


def _buckets(value: object) -> tuple[int, ...]:
    read = _integer(1)
    wanted = "an ascending list of positive integers (an empty list: one bucket)"
    if not isinstance(value, (list, tuple)):
        raise ValueError(wanted)
    try:
        edges = tuple(read(v) for v in value)
    except ValueError:
        raise ValueError(wanted) from None
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(wanted)
    return edges


def _setting(default: Any, read: Callable[[object], Any], help_text: str) -> Any:
    """A settings field; None as the default means that `null` is allowed in the file."""
    return field(default=default, metadata={"read": read, "help": help_text})


# -- the settings --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerConfig:
    """What the handler reads at load; every field is a key of the `handler:` section."""

    mode: str | None = _setting(
        None,
        _one_of(*MODES),
        "`sequence_classification` or `question_answering`; null takes it from the traced file, "
        "and any other value must agree with the file.",
    )
    model_file: str = _setting(
        "traced_model.pt", _file_name, "The traced model's file name in the archive."
    )
    tokenizer_file: str = _setting(
        "tokenizer.json",
        _file_name,
        "The tokenizer's file name in the archive; when it is missing, `vocab.txt` is read.",
    )
    do_lower_case: bool | None = _setting(
        None,
        _boolean,
        "Lower-case the text before WordPiece; null keeps what the tokenizer's file says.",
    )
    max_length: int | None = _setting(
        None,
        _integer(4),
        "Most tokens of one sequence, special tokens included; null is the model's positions.",
    )
    truncation: bool = _setting(
        True,
        _boolean,
        "Classification inputs over `max_length`: true cuts them and says so in the answer "
        '(`"truncated": true`), false answers 422. A request may override it.',
    )
    length_buckets: tuple[int, ...] | None = _setting(
        None,
        _buckets,
        "Upper edges, in tokens, of the length buckets; null derives them from the model's "
        "positions, an empty list makes one bucket.",
    )
    max_batch_tokens: int = _setting(
        16384,
        _integer(1),
        "Most tokens the encoder gets at once; a longer batch runs in several parts. One sequence "
        "always runs, whatever its length.",
    )
    max_inputs_per_request: int = _setting(
        128, _integer(1), "Most inputs in one request's list; more answers 413."
    )
    max_text_chars: int = _setting(
        250_000, _integer(1), "Most characters of one text; more answers 413."
    )
    function_to_apply: str | None = _setting(
        None,
        _one_of(*FUNCTIONS),
        "`softmax`, `sigmoid` or `none` (a string) over the logits; null chooses by the model: "
        "regression none, multi-label or one label sigmoid, else softmax. A request may override "
        "it.",
    )
    top_k: int | None = _setting(
        None,
        _integer(1),
        "How many answers: null gives the best one as an object; a number gives a sorted list "
        "(question answering: a list from 2 on). A request may override it.",
    )
    doc_stride: int | None = _setting(
        None,
        _integer(0),
        "Question answering: tokens shared by neighbouring windows of a long context; null is "
        "min(max_seq_len // 2, 128). A request may override it.",
    )
    max_answer_len: int = _setting(
        15,
        _integer(1),
        "Question answering: most tokens of an answer. A request may override it.",
    )
    max_seq_len: int | None = _setting(
        None,
        _integer(4),
        "Question answering: most tokens of a window, question included; null is "
        "min(max_length, 384). A request may override it.",
    )
    max_question_len: int = _setting(
        64,
        _integer(1),
        "Question answering: most tokens of a question; longer ones are cut. A request may "
        "override it.",
    )
    handle_impossible_answer: bool = _setting(
        False,
        _boolean,
        "Question answering: let the empty answer compete. A request may override it.",
    )
    align_to_words: bool = _setting(
        True,
        _boolean,
        "Question answering: widen answers to whole words. A request may override it.",
    )
    device: str = _setting(
        "auto",
        _one_of(*DEVICES),
        "`auto` takes the GPU that TorchServe assigned, when it assigned one; `cpu` and `cuda` "
        "insist.",
    )
    num_threads: int | None = _setting(
        None,
        _integer(1, 4096),
        "CPU threads of one worker's encoder (torch.set_num_threads); null leaves torch's choice.",
    )
    warmup: bool = _setting(
        True, _boolean, "Run sample batches at load, so that the first request is not slow."
    )
    cuda_graph_memory_mb: int = _setting(
        1024,
        _integer(0),
        "Megabytes of GPU memory that captured CUDA graphs may take; 0 captures none.",
    )
    batch_invariant: bool = _setting(
        False,
        _boolean,
        "Take every sum on a GPU in one order, so that hidden states do not depend on what shares "
        "the batch, at some cost in speed (docs/performance.md); needs an sm_90 GPU and fp16 or "
        "bf16. On a CPU they never do.",
    )
    metrics: bool = _setting(
        True, _boolean, "Emit the metrics of `ft_handler.metrics` to TorchServe, once a batch."
    )
    fast_receive: bool = _setting(
        True,
        _boolean,
        "Read requests from TorchServe through a buffer; only with the TorchServe version it was "
        "tested with, otherwise the stock reader stays.",
    )
    # Names of the older setup_config.json, kept so that existing archives load.
    model_name: str | None = _setting(
        None, _text, "Older name of the checkpoint; informative, the traced file decides."
    )
    num_labels: int | None = _setting(
        None, _integer(1), "Number of labels; must agree with the traced file when set."
    )
    save_mode: str | None = _setting(
        None, _one_of("torchscript", "pretrained"), "Only `torchscript` can be served."
    )
    captum_explanation: bool = _setting(
        False, _boolean, "Explanations are not offered; only false is accepted."
    )
    embedding_name: str | None = _setting(
        None, _text, "Older name of the embedding layer for explanations; has no effect."
    )
    FasterTransformer: bool = _setting(
        True, _boolean, "The fused ops; only true is accepted, the traced file holds nothing else."
    )
    BetterTransformer: bool = _setting(
        False, _boolean, "An older handler's switch; only false is accepted."
    )
    model_parallel: bool = _setting(
        False, _boolean, "An older handler's switch; only false is accepted."
    )

    def __post_init__(self) -> None:
        if self.save_mode == "pretrained":
            raise ConfigError(
                "setting 'save_mode' is 'pretrained', but this handler serves traced models: "
                "run `ft-handler trace` and set 'torchscript'"
            )
        for name, wanted in (
            ("captum_explanation", False),
            ("BetterTransformer", False),
            ("model_parallel", False),
            ("FasterTransformer", True),
        ):
            if getattr(self, name) is not wanted:
                raise ConfigError(
                    f"setting '{name}' is {str(not wanted).lower()}, but this handler only works "
                    f"with {str(wanted).lower()}"
                )
        if self.mode == "sequence_classification":
            for name in ("doc_stride", "max_seq_len"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"setting '{name}' is for question_answering, but 'mode' is "
                        "sequence_classification"
                    )
        if self.mode == "question_answering" and self.function_to_apply is not None:
            raise ConfigError(
                "setting 'function_to_apply' is for sequence_classification, but 'mode' is "
                "question_answering"
            )
        if (
            self.max_seq_len is not None
            and self.max_length is not None
            and self.max_seq_len > self.max_length
        ):
            raise ConfigError(
                f"setting 'max_seq_len' ({self.max_seq_len}) is over 'max_length' "
                f"({self.max_length})"
            )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, object], where: str) -> HandlerConfig:
        """Settings from a mapping; `where` names its file in errors. Raises ConfigError."""
        known = {f.name: f for f in fields(cls)}
        unknown = [str(name) for name in settings if name not in known]
        if unknown:
            raise ConfigError(
                f"unknown setting{'s' * (len(unknown) > 1)} in {where}: "
                + ", ".join(repr(name) for name in sorted(unknown))
            )
        values: dict[str, Any] = {n: _read(known[n], v, where) for n, v in settings.items()}
        return cls(**values)

    @classmethod
    def from_model_dir(
        cls, model_dir: Path, model_yaml: Mapping[str, object] | None
    ) -> HandlerConfig:
        """Settings of an extracted archive: the yaml's `handler:` section, `setup_config.json`.

        Raises ConfigError for unknown names, values of the wrong type and contradictions.
        """
        section: Any = (model_yaml or {}).get("handler")
        if section is None:
            section = {}
        if not isinstance(section, Mapping):
            raise ConfigError("'handler' in model-config.yaml must be a mapping of settings")
        older_path = model_dir / "setup_config.json"
        older: Any = {}
        if older_path.is_file():
            try:
                older = json.loads(older_path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"setup_config.json is not JSON: {error}") from None
            if not isinstance(older, Mapping):
                raise ConfigError("setup_config.json must hold an object")
        new_name = "the handler section of model-config.yaml"
        if not older:
            return cls.from_mapping(section, new_name)
        # Each alone first, so that an error names the file at fault.
        a = cls.from_mapping(section, new_name)
        b = cls.from_mapping(older, "setup_config.json")
        for name in section:
            if name in older and getattr(a, name) != getattr(b, name):
                raise ConfigError(
                    f"setting '{name}' is {getattr(a, name)!r} in {new_name} but "
                    f"{getattr(b, name)!r} in setup_config.json"
                )
        return cls.from_mapping(
            {**older, **section}, "model-config.yaml and setup_config.json together"
        )


def _read(spec: Field[Any], value: object, where: str) -> object:
    if value is None and spec.default is None:
        return None
    try:
        return spec.metadata["read"](value)
    except ValueError as error:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(
            f"setting '{spec.name}' in {where} must be {error}, not {shown}"
        ) from None


def settings_table() -> list[tuple[str, object, str]]:
    """Every setting as (name, default, meaning), in the order of the class."""
    assert all(f.default is not MISSING for f in fields(HandlerConfig))
    return [(f.name, f.default, f.metadata["help"]) for f in fields(HandlerConfig)]
