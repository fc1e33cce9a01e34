"""`ft-handler trace`: a checkpoint in, everything an archive needs out.

The options keep the names of NVIDIA's published TorchServe example for FasterTransformer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ft_handler import precisions, tasks
from ft_handler.errors import ModelError
from ft_handler.files import TRACED_FILE
from ft_handler.model.bundle import save_model
from ft_handler.model.info import FORMAT_VERSION, ModelInfo, QuantizedInfo
from ft_handler.native.library import load_library
from ft_handler.prepare import quantize
from ft_handler.prepare.calibration import rounded_better
from ft_handler.prepare.checkpoint import Checkpoint, load_checkpoint
from ft_handler.prepare.compare import (
    Reference,
    compare,
    hold_exact,
    sample_batch,
    stays_finite,
    trace_plain,
)
from ft_handler.prepare.fuse import fuse, head_arguments
from ft_handler.prepare.hf import import_transformers, quiet_transformers
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.quantize import Drawn, Measured, Simulation, Stacks
from ft_handler.prepare.settings import write_settings
from ft_handler.prepare.tokenizer import write_tokenizer
from ft_handler.tasks.base import AnyTask
from ft_handler.version import __version__

#: Random sequences that stand in for calibration texts; more of them say more than longer ones.
CALIBRATION_SAMPLES, CALIBRATION_LONGEST = 32, 128


def trace(options: TraceOptions, say: Callable[[str], None] = lambda _: None) -> Path:
    """Convert, script, check against transformers and write the folder; returns it.

    `say` hears one line a step. Raises ModelError, LibraryError or EnvironmentProblem in words.
    """
    precision = precisions.get(options.data_type)
    tasks.get(options.mode)  # a mode that is none is told before anything is loaded
    if options.batch_size < 1:
        raise ModelError("batch_size must be at least 1")
    if precision.quantized is not None and options.model_type != "thsext":
        raise ModelError(
            f"--data_type {precision.name} needs --model_type thsext, not {options.model_type}"
        )
    for_quantized = (options.calibration, options.keep_products, options.tolerable_change)
    if precision.quantized is None and any(wish is not None for wish in for_quantized):
        raise ModelError(
            "--calibrate, --keep_products and --tolerable_change are for --data_type "
            f"{' and '.join(precisions.quantized_names())}, not {precision.name}"
        )
    if options.keep_products is not None and options.tolerable_change is not None:
        raise ModelError("--keep_products says what --tolerable_change would find: give one")
    if options.tolerable_change is not None and not options.tolerable_change > 0:
        raise ModelError("tolerable_change must be more than 0")
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
        wishes=options.wishes,
    )
    tailored = checkpoint.tailored
    task = tailored.task
    for note in checkpoint.notes:
        say(f"note: {note}")
    _weigh(checkpoint.doubts, options.strict, say)
    config, architecture = checkpoint.config, checkpoint.architecture
    positions = architecture.positions(config)
    if not 4 <= (options.max_seq_length or positions) <= positions:
        raise ModelError(
            f"max_seq_length {options.max_seq_length} is not between 4 and the model's "
            f"{positions} positions"
        )
    output = options.output
    for read in (options.model_name_or_path, options.tokenizer_name, options.config_name):
        if read and Path(read).expanduser().resolve() == output.resolve():
            raise ModelError(
                f"{output}: holds the checkpoint, whose files would be overwritten; give --output "
                "another folder"
            )
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(options, output, config.vocab_size, tailored.lower_case)
    for note in tokenizer.notes:
        say(f"note: {note}")
    _weigh(tokenizer.doubts, options.strict, say)
    most = tailored.longest or tokenizer.longest or positions
    longest = options.max_seq_length or max(4, min(positions, most))
    if options.model_type == "ori":
        with quiet_transformers():
            checkpoint.model.to(precision.dtype).save_pretrained(output)
        say(f"wrote {output} (an eager checkpoint for comparisons; it cannot be served)")
        return output
    info = describe(options, task, checkpoint, tokenizer.lower_case)
    token_types = architecture.token_types(config)
    pad = architecture.pad(config)
    samples = sample_batch(options, info.vocab_size, token_types, pad, longest)
    head = architecture.head(task)
    reference = Reference(checkpoint.model, token_types > 0, head.expected).eval()
    say(f"tracing {describe_shape(task, info)}")
    weights = checkpoint.weights
    stacks: Stacks | None = None
    simulated, typical = None, 0.0
    if options.model_type == "thsext":
        if precision.quantized is not None:
            simulation = Simulation(
                architecture.spec(config),
                weights,
                head.module(**head_arguments(weights)),
                precision,
            )
            hold_exact(simulation.padded(None), reference, task.per_token, samples)
            texts = calibration_texts(options, info, token_types, pad, longest, tokenizer.text)
            half = stays_finite(reference, precision.dtype, task.per_token, samples)
            measured = Measured(simulation, texts.measured, least_output(task))
            if texts.rounded_for is not None:
                measured = rounded_better(measured, texts.rounded_for, say)
                simulation = measured.simulation
                hold_exact(simulation.padded(None), reference, task.per_token, samples)
                weights, stacks = replace(weights, encoder=simulation.encoder), simulation.stacks
            quantized = choose_products(options, measured, half, say)
            info = replace(info, quantized=quantized)
            simulated = simulation.padded(quantized.kept)
            # The file is checked here, on a CPU.
            error = quantized.error
            if simulation.differs_on_cpus:
                error = measured.on_a_cpu(quantized.kept)
            typical = error * measured.outputs
        module = fuse(
            task,
            head,
            architecture.spec(config),
            weights,
            precision,
            info.num_labels,
            info.quantized.kept if info.quantized is not None else (),
            stacks,
        )
    else:
        module = trace_plain(reference, precision.dtype, samples)
    with tempfile.TemporaryDirectory(prefix=".checking-", dir=output) as scratch:
        candidate = Path(scratch) / TRACED_FILE
        save_model(module, info, candidate, tokenizer.text)
        say(f"checking {options.batch_size} random sequences of up to {longest} tokens")
        try:
            difference, allowed = compare(
                candidate, reference, precision, task.per_token, samples, simulated, typical
            )
            if not difference <= allowed:
                raise ModelError(
                    f"the traced logits differ from transformers' by {difference:.2e}, more than "
                    f"the {allowed:.2e} that {options.data_type} allows"
                )
        except ModelError as error:
            said = str(error).replace(str(candidate), options.model_name_or_path)
            raise ModelError(f"{said}; no {TRACED_FILE} was written") from error
        say(f"largest difference from transformers: {difference:.1e} (allowed: {allowed:.1e})")
        os.replace(candidate, output / TRACED_FILE)
    write_settings(task, info, longest, output)
    say(f"wrote {output}: {', '.join(sorted(p.name for p in output.iterdir() if p.is_file()))}")
    return output


def least_output(task: AnyTask) -> float:
    """What outputs at least count as, where an error is taken as a part of them.

    Logits near 0 are undecided, and errors far below 1 leave them so; vectors have any length.
    """
    return 1.0 if task.labelled or task.per_token else 0.0


def calibration_texts(
    options: TraceOptions,
    info: ModelInfo,
    token_types: int,
    pad: int | None,
    longest: int,
    tokenizer: str,
) -> Drawn:
    """What quantised products are measured on, and rounded for: texts, or random tokens.

    tokenizer  the text of a tokenizer.json

    Weights are not rounded for random tokens, whose inputs are unlike those of texts. Raises
    ModelError where there is no text.
    """
    if options.calibration is None:
        drawn = replace(options, batch_size=CALIBRATION_SAMPLES)
        most = min(longest, CALIBRATION_LONGEST)
        padded = sample_batch(drawn, info.vocab_size, token_types, pad, most)
        return Drawn(quantize.batches_of(quantize.of_padded(*padded)), None)
    texts = Drawn.of(
        quantize.of_texts(options.calibration, tokenizer, token_types, longest, options.seed)
    )
    if not texts.measured:
        raise ModelError("--calibrate: no text to measure on")
    return texts


def choose_products(
    options: TraceOptions,
    measured: Measured,
    half: bool,
    say: Callable[[str], None],
) -> QuantizedInfo:
    """The products that are kept as floats, as wished or as measured; says which, and their cost.

    half  whether the model stays within the type in which GPUs compute it
    """
    precision = precisions.get(options.data_type)
    bounds = precision.quantized
    assert bounds is not None
    bound = options.tolerable_change
    if bound is None:
        bound = bounds.random if options.calibration is None else bounds.texts
    measured_on: Literal["texts", "random tokens"] = (
        "random tokens" if options.calibration is None else "texts"
    )
    if options.keep_products is None:
        choice = quantize.choose(measured, measured.simulation.sizes, precision, bound, say)
    else:
        kept = quantize.wished(options.keep_products, measured.simulation.names)
        choice = quantize.Choice(kept, measured.quantized(kept))
    say(
        f"kept in {bounds.kept}: {', '.join(choice.kept) or 'no product'}"
        f"{' (--keep_products)' if options.keep_products is not None else ''}; on {measured_on} "
        f"outputs change by {choice.error:.1%} (products are kept from {100 * bound:g}% on)"
    )
    if not half:
        say(f"note: overflows in fp16, in which GPUs compute {options.data_type}: for CPUs alone")
    return QuantizedInfo(
        kept=list(choice.kept),
        chosen=measured_on if options.keep_products is None else "wish",
        error=choice.error,
        half=half,
    )


def _weigh(doubts: Iterable[str], strict: bool, say: Callable[[str], None]) -> None:
    """Say doubts, or refuse the first where the user is strict."""
    for doubt in doubts:
        if strict:
            raise ModelError(f"{doubt} (--strict)")
        say(f"note: {doubt}")


def describe_shape(task: AnyTask, info: ModelInfo) -> str:
    """Such as `bert 6 x 384 (12 heads), 2 labels, fp32`."""
    labels = f", {info.num_labels} labels" if task.labelled else ""
    return (
        f"{info.architecture} {info.num_layers} x {info.hidden_size} ({info.num_heads} heads)"
        f"{labels}, {info.data_type}, {info.model_type}"
    )


def describe(
    options: TraceOptions, task: AnyTask, checkpoint: Checkpoint, lower_case: bool
) -> ModelInfo:
    """The metadata of the file to write."""
    config, architecture = checkpoint.config, checkpoint.architecture
    spec, name = architecture.spec(config), options.model_name_or_path
    return ModelInfo(
        format_version=FORMAT_VERSION,
        mode=task.name,
        architecture=architecture.model_type,
        data_type=options.data_type,
        model_type="thsext" if options.model_type == "thsext" else "ths",
        remove_padding=options.model_type == "thsext",
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        intermediate_size=spec.intermediate_size,
        max_positions=architecture.positions(config),
        vocab_size=config.vocab_size,
        # Of a model without token types every token is of the one type 0.
        type_vocab_size=architecture.token_types(config) or 1,
        num_labels=task.columns(config),
        labels=checkpoint.labels,
        problem_type=getattr(config, "problem_type", None) if task.labelled else None,
        do_lower_case=lower_case,
        layer_norm_eps=spec.layer_norm_eps,
        versions={
            "torch": str(torch.__version__),
            "transformers": import_transformers().__version__,
            "ft_handler": __version__,
        },
        op_interface=max(
            spec.op_interface,
            architecture.head(task).op_interface,
            precisions.get(options.data_type).op_interface,
        ),
        function_to_apply=checkpoint.function_to_apply,
        chosen=dict(checkpoint.tailored.chosen),
        # Whoever may ask a server for these words need not know its folders.
        checkpoint=None if Path(name).expanduser().is_dir() else name,
        adapter=None if options.adapter is None else options.adapter.resolve().name,
    )
