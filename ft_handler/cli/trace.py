"""`ft-handler trace`: the names are those of NVIDIA's published TorchServe example."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ft_handler import precisions, tasks
from ft_handler.cli.choices import choice
from ft_handler.errors import ModelError
from ft_handler.prepare.options import DEFAULT_SAMPLES, TraceOptions

MODEL_TYPES = ("ori", "ths", "thsext")


def _names(name: str) -> tuple[str, str]:
    return f"--{name}", f"--{name.replace('_', '-')}"


def trace_command(
    mode: Annotated[str, choice("--mode", names=tasks.names(), help="What the model is for.")],
    model_name_or_path: Annotated[
        str | None,
        typer.Option(
            *_names("model_name_or_path"),
            help="A hub name or a folder. With --adapter: default the adapter's own base.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder to write; made when missing.")
    ] = Path(),
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
        str,
        choice(
            *_names("data_type"),
            names=precisions.names(),
            help="The encoder's type; heads are fp32.",
        ),
    ] = "fp32",
    model_type: Annotated[
        str,
        choice(
            *_names("model_type"),
            names=MODEL_TYPES,
            help="thsext: fused and padding-free. For comparison: ths, transformers' model as "
            "plain TorchScript; ori, an eager checkpoint.",
        ),
    ] = "thsext",
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
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            help="For embeddings: cls, mean, max or last. Default: what the checkpoint's "
            "modules.json says, else mean.",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="For embeddings: of length 1 or not. Default: what modules.json says, else not.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            help="For int8 and fp8: texts for which weights are rounded, and on which it is "
            "measured what that costs, in any form that `ft-handler verify` reads. Default: "
            "rounded to the nearest, measured on random tokens.",
        ),
    ] = None,
    keep_products: Annotated[
        str | None,
        typer.Option(
            *_names("keep_products"),
            help="For int8 and fp8: products to keep in 16 bits, comma-separated, such as "
            "'layers.0.down,layers.*.out', or none. Default: those whose loss is measured to be "
            "too large.",
        ),
    ] = None,
    tolerable_change: Annotated[
        float | None,
        typer.Option(
            *_names("tolerable_change"),
            help="For int8 and fp8: the change of outputs from which on products are kept in 16 "
            "bits, as a part of outputs, such as 0.02.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse what is otherwise traced with a note: tensors of training beside the "
            "model, a tokenizer that transformers reads otherwise than its file says.",
        ),
    ] = False,
) -> None:
    """Write a traced model and everything an archive needs from a checkpoint."""
    from ft_handler.prepare.adapters import read_adapter
    from ft_handler.prepare.trace import trace

    if remove_padding and model_type != "thsext":
        raise ModelError(f"--remove_padding needs --model_type thsext, not {model_type}")
    name = model_name_or_path
    if name is None and adapter is not None:
        name = read_adapter(adapter).base
    if name is None:
        raise ModelError("--model_name_or_path is missing")
    options = TraceOptions(
        mode=mode,
        model_name_or_path=name,
        output=output,
        tokenizer_name=tokenizer_name,
        config_name=config_name,
        cache_dir=cache_dir,
        adapter=adapter,
        labels=listed_in(labels) if labels else None,
        max_seq_length=max_seq_length,
        do_lower_case=do_lower_case,
        batch_size=batch_size,
        seed=seed,
        data_type=data_type,
        model_type=model_type,
        ths_path=ths_path,
        strict=strict,
        pooling=pooling,
        normalize=normalize,
        calibration=None if calibrate is None else calibration_of(calibrate),
        keep_products=None if keep_products is None else listed_in(keep_products),
        tolerable_change=tolerable_change,
    )
    trace(options, typer.echo)


def listed_in(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in text.split(",")]


def calibration_of(path: Path) -> list[Mapping[str, str]]:
    """The texts of a data file."""
    from ft_handler.verify.data import Layout, read_examples, sequences_of

    return [texts for example in read_examples(path, Layout()) for texts in sequences_of(example)]
