"""`ft-handler trace`: a checkpoint in, everything an archive needs out.

The options keep the names of NVIDIA's published TorchServe example for FasterTransformer.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_handler.errors import ModelError
from ft_handler.model.bundle import save_model, versions
from ft_handler.model.info import DATA_TYPES, FORMAT_VERSION, SEQUENCE_CLASSIFICATION, ModelInfo
from ft_handler.model.module import build_module
from ft_handler.native.library import load_library
from ft_handler.prepare.checkpoint import Checkpoint, load_checkpoint
from ft_handler.prepare.compare import compare, sample_batch, trace_plain
from ft_handler.prepare.hf import quiet_transformers
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.tokenizer import write_tokenizer

TRACED_FILE = "traced_model.pt"
CONFIG_FILE = "model-config.yaml"
LABELS_FILE = "index_to_name.json"
SAMPLE_REQUEST = "sample_request.json"
SAMPLE_TEXT = "sample_text.txt"


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
    checkpoint = load_checkpoint(
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
        with quiet_transformers():
            checkpoint.model.to(DATA_TYPES[options.data_type]).save_pretrained(output)
        say(f"wrote {output} (an eager checkpoint for comparisons; it cannot be served)")
        return output
    info = describe(options, checkpoint, lower_case)
    samples = sample_batch(options, config.vocab_size, config.type_vocab_size, longest)
    say(f"tracing {describe_shape(info)}")
    if options.model_type == "thsext":
        module = build_module(
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
        save_model(module, info, candidate)
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


def describe(options: TraceOptions, checkpoint: Checkpoint, lower_case: bool) -> ModelInfo:
    """The metadata of the file to write."""
    config = checkpoint.config
    classifies = options.mode == SEQUENCE_CLASSIFICATION
    return ModelInfo(
        format_version=FORMAT_VERSION,
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
        versions=versions(),
    )


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_settings(options: TraceOptions, info: ModelInfo, longest: int, output: Path) -> None:
    """Write model-config.yaml, the labels and the sample requests."""
    write_text(output / CONFIG_FILE, model_config(info, longest))
    sample: dict[str, Any]
    if info.mode == SEQUENCE_CLASSIFICATION:
        labels = {str(i): name for i, name in sorted(info.labels.items())}
        write_text(output / LABELS_FILE, json.dumps(labels, ensure_ascii=False, indent=1) + "\n")
        sample = {"text": "A warm, funny film that never overstays its welcome."}
        write_text(output / SAMPLE_TEXT, sample["text"] + "\n")
    else:
        sample = {
            "question": "When does the library open?",
            "context": "The town library opens at nine in the morning and closes at six.",
        }
        write_text(output / SAMPLE_TEXT, json.dumps(sample) + "\n")
    write_text(output / SAMPLE_REQUEST, json.dumps(sample, indent=1) + "\n")


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
