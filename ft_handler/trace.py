"""`ft-handler trace`: a checkpoint in, everything an archive needs out.

The options keep the names of NVIDIA's published TorchServe example for FasterTransformer.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ft_handler import convert, model
from ft_handler._lib import load_library
from ft_handler.adapters import read_adapter
from ft_handler.errors import ModelError
from ft_handler.model import DATA_TYPES, QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION, ModelInfo

TRACED_FILE = "traced_model.pt"
CONFIG_FILE = "model-config.yaml"
LABELS_FILE = "index_to_name.json"
SAMPLE_REQUEST = "sample_request.json"
SAMPLE_TEXT = "sample_text.txt"
DEFAULT_SAMPLES = 4
FP32_TOLERANCE = 1e-4
# Half precision may be off by as much again as transformers itself is, plus rounding noise.
HALF_FACTOR, HALF_FLOOR = 2.0, 2e-3


class Mode(str, Enum):
    """What the model is for."""

    sequence_classification = SEQUENCE_CLASSIFICATION
    question_answering = QUESTION_ANSWERING


class DataType(str, Enum):
    """Type of the encoder's parameters; heads are always fp32."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class ModelType(str, Enum):
    """`thsext`: fused, padding-free; `ths`: transformers' own as TorchScript; `ori`: eager."""

    ori = "ori"
    ths = "ths"
    thsext = "thsext"


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What to trace and where to; the command line's options one for one."""

    mode: str
    model_name_or_path: str
    output: Path
    tokenizer_name: str | None = None
    config_name: str | None = None
    cache_dir: str | None = None
    adapter: Path | None = None
    labels: list[str] | None = None
    max_seq_length: int | None = None
    do_lower_case: bool | None = None
    batch_size: int = DEFAULT_SAMPLES
    seed: int = 42
    data_type: str = "fp32"
    model_type: str = "thsext"
    ths_path: Path | None = None


class _PlainHead(nn.Module):
    """transformers' model behind the contract's forward: positional tensors in, fp32 tuple out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        out = self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            return_dict=False,
        )
        return tuple(part.float() for part in out)


def trace(options: TraceOptions, say: Callable[[str], None] = lambda _: None) -> Path:
    """Convert, script, check against transformers and write the folder; returns it.

    `say` hears one line a step. Raises ModelError, LibraryError or EnvironmentProblem in words.
    """
    if options.data_type not in DATA_TYPES:
        raise ModelError(f"data_type {options.data_type!r} is not one of {', '.join(DATA_TYPES)}")
    if options.batch_size < 1:
        raise ModelError("batch_size must be at least 1")
    if options.model_type == "thsext" or options.ths_path is not None:
        say(f"library: {load_library(options.ths_path)}")
    say(f"loading {options.model_name_or_path}")
    checkpoint = convert.load_checkpoint(
        options.mode,
        options.model_name_or_path,
        config_name=options.config_name,
        cache_dir=options.cache_dir,
        adapter=options.adapter,
        labels=options.labels,
    )
    for note in checkpoint.notes:
        say(f"note: {note}")
    config = checkpoint.config
    longest = options.max_seq_length or config.max_position_embeddings
    if not 4 <= longest <= config.max_position_embeddings:
        raise ModelError(
            f"max_seq_length {longest} is not between 4 and the model's "
            f"{config.max_position_embeddings} positions"
        )
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    lower_case = write_tokenizer(options, output, config.vocab_size, longest)
    if options.model_type == "ori":
        with convert.quiet_transformers():
            checkpoint.model.to(DATA_TYPES[options.data_type]).save_pretrained(output)
        say(f"wrote {output} (an eager checkpoint for comparisons; it cannot be served)")
        return output
    info = describe(options, checkpoint, lower_case)
    samples = sample_batch(options, config.vocab_size, config.type_vocab_size, longest)
    say(f"tracing {describe_shape(info)}")
    if options.model_type == "thsext":
        module = model.build_module(
            options.mode,
            checkpoint.weights,
            num_heads=info.num_heads,
            layer_norm_eps=info.layer_norm_eps,
            dtype=DATA_TYPES[options.data_type],
        )
    else:
        module = trace_plain(checkpoint.model, DATA_TYPES[options.data_type], samples)
    with tempfile.TemporaryDirectory(prefix=".checking-", dir=output) as scratch:
        candidate = Path(scratch) / TRACED_FILE
        model.save_model(module, info, candidate)
        say(f"checking {options.batch_size} random sequences of up to {longest} tokens")
        difference, allowed = compare(candidate, checkpoint.model, info, samples)
        if not difference <= allowed:
            raise ModelError(
                f"the traced logits differ from transformers' by {difference:.2e}, more than "
                f"the {allowed:.2e} that {options.data_type} allows; no {TRACED_FILE} was written"
            )
        say(f"largest difference from transformers: {difference:.1e} (allowed: {allowed:.1e})")
        os.replace(candidate, output / TRACED_FILE)
    write_settings(options, info, longest, output)
    say(f"wrote {output}: {', '.join(sorted(p.name for p in output.iterdir() if p.is_file()))}")
    return output


def describe_shape(info: ModelInfo) -> str:
    """Such as `bert 6 x 384 (12 heads), 2 labels, fp32`."""
    labels = f", {info.num_labels} labels" if info.mode == SEQUENCE_CLASSIFICATION else ""
    return (
        f"{info.architecture} {info.num_layers} x {info.hidden_size} ({info.num_heads} heads)"
        f"{labels}, {info.data_type}, {info.model_type}"
    )


def describe(options: TraceOptions, checkpoint: convert.Checkpoint, lower_case: bool) -> ModelInfo:
    """The metadata of the file to write."""
    config = checkpoint.config
    classifies = options.mode == SEQUENCE_CLASSIFICATION
    return ModelInfo(
        format_version=model.FORMAT_VERSION,
        mode=options.mode,
        architecture=checkpoint.architecture,
        data_type=options.data_type,
        model_type=options.model_type,
        remove_padding=options.model_type == "thsext",
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        type_vocab_size=config.type_vocab_size,
        num_labels=config.num_labels if classifies else 2,
        labels=checkpoint.labels,
        problem_type=getattr(config, "problem_type", None) if classifies else None,
        do_lower_case=lower_case,
        layer_norm_eps=config.layer_norm_eps,
        versions=model.versions(),
    )


def sample_batch(
    options: TraceOptions, vocab_size: int, type_vocab_size: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random padded ids, mask and types of ragged lengths: three `[batch_size, longest]` int64."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch_size, longest)
    lengths = torch.randint(2, longest + 1, (options.batch_size,), generator=generator)
    lengths[0] = longest
    columns = torch.arange(longest)
    mask = (columns < lengths[:, None]).long()
    ids = torch.randint(0, vocab_size, shape, generator=generator) * mask
    types = (columns >= lengths[:, None] // 2).long() * mask if type_vocab_size > 1 else ids * 0
    return ids, mask, types


def trace_plain(
    inner: nn.Module, dtype: torch.dtype, samples: tuple[Tensor, Tensor, Tensor]
) -> torch.jit.ScriptModule:
    """transformers' own model through `torch.jit.trace`, pads and all."""
    plain = copy.deepcopy(inner).to(dtype).eval()
    with torch.no_grad(), convert.quiet_transformers(), warnings.catch_warnings():
        # What tracing may have frozen is checked afterwards, at another shape.
        warnings.simplefilter("ignore")
        # The eager attention keeps batch and length symbolic in a trace.
        plain.set_attn_implementation("eager")  # type: ignore[operator]
        traced: torch.jit.ScriptModule = torch.jit.trace(  # type: ignore[no-untyped-call]
            _PlainHead(plain).eval(), samples, check_trace=False, strict=False
        )
    return traced


def compare(
    path: Path, reference: nn.Module, info: ModelInfo, samples: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float]:
    """Largest logit difference of the file from transformers in fp32, and what is allowed.

    In fp32 that is 1e-4 of the largest logit (at least of 1); in half precision twice the
    difference that transformers itself shows in that type. A second shape shows whether the
    first one froze into the file.
    """
    half = samples[0].shape[1] // 2
    other = tuple(part[:1, :half] for part in samples)
    traced = model.load_model(path).module
    dtype = DATA_TYPES[info.data_type]
    low = copy.deepcopy(reference).to(dtype) if dtype != torch.float32 else None
    difference, own, scale = 0.0, 0.0, 1.0
    with torch.inference_mode():
        for ids, mask, types in (samples, other):
            kept = mask.bool() if info.mode == QUESTION_ANSWERING else slice(None)
            wanted = _logits(reference, ids, mask, types)
            scale = max(scale, *(float(w[kept].abs().max()) for w in wanted))
            difference = max(difference, _apart(list(traced(ids, mask, types)), wanted, kept))
            if low is not None:
                own = max(own, _apart(_logits(low, ids, mask, types), wanted, kept))
    if low is None:
        return difference, FP32_TOLERANCE * scale
    return difference, HALF_FACTOR * own + HALF_FLOOR * scale


def _logits(inner: nn.Module, ids: Tensor, mask: Tensor, types: Tensor) -> list[Tensor]:
    out = inner(input_ids=ids, attention_mask=mask, token_type_ids=types, return_dict=False)
    return [part.float() for part in out]


def _apart(found: list[Tensor], wanted: list[Tensor], kept: Tensor | slice) -> float:
    """Largest difference over kept tokens; infinite when anything is not a number."""
    apart = [(a - b)[kept].abs() for a, b in zip(found, wanted, strict=True)]
    return max(float(d.nan_to_num(nan=float("inf")).max()) for d in apart)


# -- the files beside the traced model -----------------------------------------------------------


def write_tokenizer(options: TraceOptions, output: Path, vocab_size: int, longest: int) -> bool:
    """Write the tokenizer's files, without truncation or padding; returns whether it lower-cases.

    Truncation belongs to the handler's settings: a tokenizer.json that truncates would do it
    silently.
    """
    transformers = convert.import_transformers()
    wanted = options.tokenizer_name or options.model_name_or_path
    source = convert.resolve(wanted, options.cache_dir)
    extra = {} if options.do_lower_case is None else {"do_lower_case": options.do_lower_case}
    with convert.quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source.name,
                cache_dir=options.cache_dir,
                local_files_only=source.local_only,
                use_fast=True,
                **extra,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"tokenizer {wanted}: {convert.first_line(error)}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"tokenizer {wanted}: has no fast form")
        backend.no_truncation()
        backend.no_padding()
        tokenizer.model_max_length = longest
        tokenizer.save_pretrained(str(output))
    backend.no_truncation()
    backend.no_padding()
    described = json.loads(backend.to_str())
    normalizer = described.get("normalizer") or {}
    if options.do_lower_case is not None:
        if "lowercase" not in normalizer:
            raise ModelError(f"tokenizer {wanted}: do_lower_case has nothing to set in it")
        normalizer["lowercase"] = options.do_lower_case
    _write(output / "tokenizer.json", json.dumps(described, ensure_ascii=False, indent=2) + "\n")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise ModelError(
            f"tokenizer {wanted}: has token {largest}, the model's vocabulary ends at "
            f"{vocab_size - 1}; it belongs to another model"
        )
    if described["model"].get("type") == "WordPiece":
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        _write(output / "vocab.txt", "\n".join(words) + "\n")
    return bool(normalizer.get("lowercase", False))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_settings(options: TraceOptions, info: ModelInfo, longest: int, output: Path) -> None:
    """Write model-config.yaml, the labels and the sample requests."""
    _write(output / CONFIG_FILE, model_config(info, longest))
    sample: dict[str, Any]
    if info.mode == SEQUENCE_CLASSIFICATION:
        labels = {str(i): name for i, name in sorted(info.labels.items())}
        _write(output / LABELS_FILE, json.dumps(labels, ensure_ascii=False, indent=1) + "\n")
        sample = {"text": "A warm, funny film that never overstays its welcome."}
        _write(output / SAMPLE_TEXT, sample["text"] + "\n")
    else:
        sample = {
            "question": "When does the library open?",
            "context": "The town library opens at nine in the morning and closes at six.",
        }
        _write(output / SAMPLE_TEXT, json.dumps(sample) + "\n")
    _write(output / SAMPLE_REQUEST, json.dumps(sample, indent=1) + "\n")


def model_config(info: ModelInfo, longest: int) -> str:
    """The text of model-config.yaml."""
    return f"""\
# TorchServe's settings of this model; they beat config.properties.
minWorkers: 1
maxWorkers: 1
batchSize: 32
# Milliseconds to wait for a batch to fill; 0 would become 100.
maxBatchDelay: 5
# Seconds.
responseTimeout: 120
startupTimeout: 300

# The handler's settings; docs/configuration.md lists them all with their defaults.
handler:
  mode: {info.mode}
  max_length: {longest}
"""


# -- the command ---------------------------------------------------------------------------------


def _names(name: str) -> tuple[str, str]:
    return f"--{name}", f"--{name.replace('_', '-')}"


def trace_command(
    mode: Annotated[Mode, typer.Option("--mode", help="What the model is for.")],
    model_name_or_path: Annotated[
        str | None,
        typer.Option(
            *_names("model_name_or_path"),
            help="A hub name or a folder. With --adapter: default the adapter's own base.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder to write; made when missing.")
    ] = Path("traced_model"),
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A PEFT LoRA adapter's folder, merged in.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            help="Label names in order, comma-separated. Default: labels.json in the adapter's "
            "folder, else the checkpoint's id2label.",
        ),
    ] = None,
    tokenizer_name: Annotated[
        str | None,
        typer.Option(*_names("tokenizer_name"), help="Tokenizer, if not the checkpoint's own."),
    ] = None,
    config_name: Annotated[
        str | None,
        typer.Option(*_names("config_name"), help="Configuration, if not the checkpoint's own."),
    ] = None,
    cache_dir: Annotated[
        str | None, typer.Option(*_names("cache_dir"), help="Where hub downloads are kept.")
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            *_names("max_seq_length"),
            min=4,
            help="Most tokens served (max_length in model-config.yaml), and of the sample that "
            "checks the file. The traced file takes any length. Default: the model's positions.",
        ),
    ] = None,
    do_lower_case: Annotated[
        bool | None,
        typer.Option(
            "--do_lower_case/--no_do_lower_case",
            "--do-lower-case/--no-do-lower-case",
            help="Lower-case text or not. Default: what the tokenizer says.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            *_names("batch_size"),
            min=1,
            help="Sequences in the sample that checks the file; the file takes any batch.",
        ),
    ] = DEFAULT_SAMPLES,
    seed: Annotated[int, typer.Option("--seed", help="Seed of that sample.")] = 42,
    data_type: Annotated[
        DataType, typer.Option(*_names("data_type"), help="The encoder's type; heads are fp32.")
    ] = DataType.fp32,
    model_type: Annotated[
        ModelType,
        typer.Option(
            *_names("model_type"),
            help="thsext: fused and padding-free. For comparison: ths, transformers' model as "
            "plain TorchScript; ori, an eager checkpoint.",
        ),
    ] = ModelType.thsext,
    ths_path: Annotated[
        Path | None,
        typer.Option(
            *_names("ths_path"), help="libpyt_fastertransformer.so, if not the package's own."
        ),
    ] = None,
    remove_padding: Annotated[
        bool,
        typer.Option(
            *_names("remove_padding"),
            help="Accepted for old scripts: thsext always removes padding, ths and ori never do.",
        ),
    ] = False,
) -> None:
    """Write a traced model and everything an archive needs from a BERT checkpoint."""
    if remove_padding and model_type is not ModelType.thsext:
        raise ModelError(f"--remove_padding needs --model_type thsext, not {model_type.value}")
    name = model_name_or_path
    if name is None and adapter is not None:
        name = read_adapter(adapter).base
    if name is None:
        raise ModelError("--model_name_or_path is missing")
    options = TraceOptions(
        mode=mode.value,
        model_name_or_path=name,
        output=output,
        tokenizer_name=tokenizer_name,
        config_name=config_name,
        cache_dir=cache_dir,
        adapter=adapter,
        labels=[part.strip() for part in labels.split(",")] if labels else None,
        max_seq_length=max_seq_length,
        do_lower_case=do_lower_case,
        batch_size=batch_size,
        seed=seed,
        data_type=data_type.value,
        model_type=model_type.value,
        ths_path=ths_path,
    )
    trace(options, typer.echo)
