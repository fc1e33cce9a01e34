"""The encoder beside what a user could pick instead, on the same ragged batches.

    python benchmarks/encoder.py                          # this machine's processor
    python benchmarks/encoder.py --model minilm base --batch 1 16 --lengths sst2 squad
    python benchmarks/encoder.py --device cuda            # the GPU workloads
    python benchmarks/encoder.py --device cuda --rows "base ragged" --skip hf_compile
    python benchmarks/encoder.py --device cuda --rows squad --columns ours packed gemms

All systems of a row run interleaved, round by round, so that a disturbance or a clock change hits
all of them; figures are medians. A system that is not installed is left out and named. Weights are
random, with BERT's shapes; `ours` and HF share them, and their outputs are compared in every row.
`--family` takes another architecture than BERT: of the same sizes, with its own embeddings, and for
MPNet its attention. Columns of plain torch stay BERT's: the same work but for that attention.

CPU columns       hf, compile, onnxruntime, openvino, ctranslate2 (all padded to the longest but
                  the last), packed (plain torch, no pads), gemms (the matrix products alone), ours,
                  each with its precision behind it. In int8 every engine takes the way that its own
                  documentation gives for BERT on a CPU: ONNX Runtime quantises the fused graph
                  dynamically, weights per output channel; OpenVINO's model comes from NNCF with the
                  transformer preset, weights and activations both quantised, SmoothQuant and
                  calibration included; CTranslate2 computes as `compute_type="int8"`
CUDA columns      hf_sdpa, hf_compile, hf_sdpa_graph, bt_nested, packed_fa2, packed_fa2_graph,
                  packed_compile_graph, gemms_graph, ours (in a CUDA graph), ours_eager
                  hf_* and ours include the embeddings, the others get hidden states.
                  In FP8, all in a CUDA graph: ours_fp8; gemms_fp8, the products alone through
                  cuBLASLt; and plain torch, compiled, packed_fp8_row (weights with a scale an
                  output, inputs with one a token) and packed_fp8_tensor (one fixed scale each).
                  Rows named squad have the set's lengths and say sequences a second
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ft_handler import architectures, build_info, load_library, precisions, tasks
from ft_handler.model.encoder import Encoder
from ft_handler.prepare import quantize

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import device_name, provenance

from ft_handler.tuning import table

Run = Callable[[], Any]
Shape = tuple[int, int, int, int]
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

# layers, hidden, intermediate, heads
MODELS = {"minilm": (6, 384, 1536, 12), "base": (12, 768, 3072, 12), "large": (24, 1024, 4096, 16)}

FAMILIES = ("bert", "roberta", "distilbert", "mpnet")

PRECISIONS = ("fp32", "bf16", "int8")

# Seconds of one system's turn in a round of the CPU rows, and between turns: other engines' threads
# look for work for some milliseconds after theirs is done.
TURN, REST = 0.05, 0.03

# GPU -> TFLOP/s in half precision and GB/s from memory that plain kernels were seen to reach.
CEILINGS = {"NVIDIA H200": (790, 4300), "NVIDIA H100 80GB HBM3": (798, 3000)}

# The largest number of e4m3, and what 1 is worth in an input that has one fixed scale.
LARGEST_FP8, FIXED_SCALE = 448, 0.02

# The order matters: lengths are drawn row by row from one generator.
CUDA_ROWS = [
    ("base", "fixed", 1, 32),
    ("base", "fixed", 1, 128),
    ("base", "fixed", 8, 128),
    ("base", "fixed", 1, 384),
    ("base", "fixed", 32, 128),
    ("base", "ragged", 16, 64),
    ("base", "ragged", 16, 128),
    ("base", "ragged", 16, 256),
    ("base", "ragged", 16, 512),
    ("base", "ragged", 64, 128),
    ("base", "ragged", 128, 128),
    ("base", "ragged", 64, 384),
    ("base", "ragged", 256, 384),
    ("large", "fixed", 1, 128),
    ("large", "ragged", 64, 384),
    ("large", "squad", 64, 384),
    ("large", "squad", 256, 384),
]


def draw_lengths(kind: str, batch: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """`[batch]` lengths: all `longest`, uniform in [0.2, 1] x `longest`, one at it, or a set's."""
    if kind == "fixed":
        return np.full(batch, longest)
    if kind != "ragged":
        return lengths_like(kind, batch)
    lengths = rng.integers(int(0.2 * longest), longest + 1, size=batch)
    lengths[0] = longest
    return lengths


def lengths_like(mix: str, batch: int) -> np.ndarray:
    """`[batch]` lengths that stand for a set of lengths.json: its evenly spaced quantiles, mixed.

    One text has the set's median length.
    """
    counted = json.loads((HERE / "lengths.json").read_text())[mix]
    every = np.repeat([length for length, _ in counted], [count for _, count in counted])
    places = ((np.arange(batch) + 0.5) / batch * len(every)).astype(int)
    return np.random.default_rng(0).permutation(every[places])


def workloads(wanted: list[str], family: str = "") -> list[tuple[str, str, np.ndarray]]:
    """Name, size and lengths `[batch]` of every CUDA row whose name contains a wanted text."""
    rng = np.random.default_rng(0)
    rows = []
    for size, kind, batch, longest in CUDA_ROWS:
        lengths = draw_lengths(kind, batch, longest, rng)  # also for rows that are left out
        name = f"{family}{size} {kind} b{batch} s{longest}"
        if not wanted or any(part in name for part in wanted):
            rows.append((name, size, lengths))
    return rows


class Batch:
    """One ragged batch, padded and packed."""

    def __init__(self, lengths: np.ndarray, device: str) -> None:
        self.lengths = [int(n) for n in lengths]
        self.batch, self.longest = len(self.lengths), max(self.lengths)
        self.total, self.padded = sum(self.lengths), len(self.lengths) * max(self.lengths)
        self.ids = torch.randint(1000, 30000, (self.batch, self.longest), device=device)
        columns = torch.arange(self.longest, device=device)[None]
        self.mask = (columns < torch.tensor(self.lengths, device=device)[:, None]).long()
        self.packed_ids = self.ids[self.mask.bool()]
        self.types = torch.zeros_like(self.packed_ids)
        edges = np.concatenate([[0], np.cumsum(self.lengths)])
        self.offsets = [int(e) for e in edges]
        self.cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)

    def gflop(self, layers: int, hidden: int, inner: int) -> float:
        """Multiply-adds counted twice: matrix products and attention, without pads."""
        products = 2 * self.total * (4 * hidden * hidden + 2 * hidden * inner)
        return layers * (products + sum(4 * n * n * hidden for n in self.lengths)) / 1e9

    def gbyte(self, layers: int, hidden: int, inner: int) -> float:
        """Weights once, every layer's results written once and read once, in half precision.

        A layer hands on QKV (3 H a token), attention, two normalised sums (H each, the residual
        read twice) and the inner activations.
        """
        weights = 4 * hidden * hidden + 2 * hidden * inner
        a_token = 2 * (3 * hidden + hidden + 2 * hidden + inner) + 2 * hidden
        return 2 * layers * (weights + self.total * a_token) / 1e9


#: What is prepared once and runs on any batch.
Engine = Callable[[Batch], Run]


def hf_model(family: str, shape: Shape, longest: int, pooled: bool = False) -> torch.nn.Module:
    """A random encoder of transformers, with its pooler or without."""
    from transformers import AutoConfig, AutoModel

    layers, hidden, inner, heads = shape
    config = AutoConfig.for_model(family)
    # Positions that begin behind the pad's are two more.
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "hidden_dim": inner,
        "num_attention_heads": heads,
        "max_position_embeddings": max(512, longest) + 2,
    }
    for name, size in sizes.items():
        if hasattr(config, name):
            setattr(config, name, size)
    pooler = {} if family == "distilbert" else {"add_pooling_layer": pooled}
    return AutoModel.from_config(config, **pooler).eval()


def our_encoder(model: torch.nn.Module, precision: str) -> Engine:
    """The encoder of a traced file, over the weights of transformers' model."""
    architecture = architectures.get(model.config.model_type)
    state = model.state_dict()
    weights = architecture.weights(tasks.get("embeddings"), model.config, state).encoder
    row = precisions.get(precision)
    if row.quantized is None:
        encoder = Encoder(
            architecture.spec(model.config), {n: row.stored(w) for n, w in weights.items()}
        )
    else:  # random weights have no product that would have to be kept
        spec = architecture.spec(model.config)
        encoder = Encoder(spec, *quantize.stored(spec, weights, row, ()))
    encoder.release()
    return lambda batch: (
        lambda: encoder(batch.packed_ids, batch.types, None, batch.cu_seqlens, batch.longest)
    )


def copy_of(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy in another type."""
    return copy.deepcopy(model).to(dtype)


def hf_run(model: torch.nn.Module, batch: Batch) -> Run:
    return lambda: model(batch.ids, batch.mask).last_hidden_state


def difference(ours: torch.Tensor, padded: torch.Tensor, batch: Batch) -> float:
    """Largest difference over the real tokens."""
    return float((ours.float() - padded[batch.mask.bool()].float()).abs().max())


# -- processor -----------------------------------------------------------------------------------


def packed_run(model: torch.nn.Module, heads: int, batch: Batch) -> Run:
    """Plain torch without pads: linear layers over all tokens, attention sequence by sequence."""
    e, layers = model.embeddings, list(model.encoder.layer)
    positions = torch.cat([torch.arange(n) for n in batch.lengths])
    spans = list(zip(batch.offsets[:-1], batch.offsets[1:], strict=True))

    def run() -> torch.Tensor:
        x = e.word_embeddings(batch.packed_ids) + e.position_embeddings(positions)
        x = e.LayerNorm(x + e.token_type_embeddings.weight[0])
        total, hidden = x.shape
        for layer in layers:
            own = layer.attention.self
            q, k, v = (
                p(x).view(total, heads, hidden // heads) for p in (own.query, own.key, own.value)
            )
            mixed = torch.empty_like(q)
            for a, b in spans:
                part = (t[a:b].transpose(0, 1) for t in (q, k, v))
                mixed[a:b] = F.scaled_dot_product_attention(*part).transpose(0, 1)
            out = layer.attention.output
            x = out.LayerNorm(out.dense(mixed.view(total, hidden)) + x)
            x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
        return x

    return run


def gemms(shape: Shape, total: int, dtype: torch.dtype, device: str) -> Run:
    """The encoder's matrix products alone, each layer with weights of its own."""
    layers, hidden, inner, _ = shape
    sizes = [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]
    weights = [[torch.nn.Linear(k, n).to(device, dtype) for n, k in sizes] for _ in range(layers)]
    inputs = {k: torch.randn(total, k, device=device, dtype=dtype) for k in {hidden, inner}}

    def run() -> None:
        for layer in weights:
            for linear in layer:
                linear(inputs[linear.in_features])

    return run


def write_onnx(model: torch.nn.Module, path: Path) -> None:
    """Export the model with free batch and length."""

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, mask).last_hidden_state

    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    sample = Batch(np.array([48, 64]), "cpu")
    torch.onnx.export(
        Hidden(), (sample.ids, sample.mask), path, input_names=["ids", "mask"],
        output_names=["out"], dynamo=True, external_data=True,
        dynamic_shapes={"ids": free, "mask": free}, verbose=False,
    )  # fmt: skip


def write_fused(exported: Path, shape: Shape, path: Path) -> None:
    """The exported graph with ONNX Runtime's fusions for BERT, as its own recipe has it."""
    from onnxruntime.transformers import optimizer

    graph = optimizer.optimize_model(
        str(exported), model_type="bert", num_heads=shape[3], hidden_size=shape[1], opt_level=1
    )
    graph.save_model_to_file(str(path), use_external_data_format=True)


def write_quantised(fused: Path, path: Path) -> None:
    """The fused graph with its products quantised dynamically, weights per output channel."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        fused, path, per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Attention"], use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
    )  # fmt: skip


def onnxruntime_engine(path: Path) -> Engine:
    """A session over a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def engine(batch: Batch) -> Run:
        feeds = {"ids": batch.ids.numpy(), "mask": batch.mask.numpy()}
        return lambda: session.run(None, feeds)

    return engine


def openvino_engine(path: Path, hint: str | None) -> Engine:
    """A compiled model; without a hint the plugin picks the type of what is not int8."""
    import openvino

    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Pinned, it takes cores from the other systems of this process.
        "ENABLE_CPU_PINNING": False,
    }
    if hint:
        settings["INFERENCE_PRECISION_HINT"] = hint
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def engine(batch: Batch) -> Run:
        feeds = {"ids": batch.ids.numpy(), "mask": batch.mask.numpy()}
        return lambda: request.infer(feeds)

    return engine


def write_nncf(exported: Path, path: Path) -> None:
    """The graph with weights and activations quantised by NNCF, calibrated on random tokens."""
    import nncf
    import openvino

    texts = [Batch(np.array([length]), "cpu") for length in lengths_like("sst2", 16)]
    feeds = [{"ids": text.ids.numpy(), "mask": text.mask.numpy()} for text in texts]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        quantised = nncf.quantize(
            openvino.Core().read_model(exported), nncf.Dataset(feeds), subset_size=len(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
        )  # fmt: skip
    openvino.save_model(quantised, path, compress_to_fp16=False)


def write_ctranslate2(family: str, shape: Shape, folder: Path) -> None:
    """A checkpoint of the same shape, converted; its converter wants a pooler and a tokenizer."""
    import ctranslate2
    import transformers

    model = hf_model(family, shape, 512, pooled=True)
    transformers.utils.logging.disable_progress_bar()
    # The converter reads an attribute that newer transformers dropped.
    type(model.config).position_embedding_type = "absolute"
    source = folder.with_name("checkpoint")
    model.save_pretrained(source)
    count = model.config.vocab_size
    if family == "roberta":
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocabulary = {name: i for i, name in enumerate(filled(names, count))}
        transformers.RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(source)
    else:
        names = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (source / "vocab.txt").write_text("\n".join(filled(names, count)))
        transformers.BertTokenizer(str(source / "vocab.txt")).save_pretrained(source)
    ctranslate2.converters.TransformersConverter(str(source)).convert(str(folder), force=True)


def filled(names: list[str], count: int) -> list[str]:
    """Names of tokens, `count` of them."""
    return [*names, *(f"token{i}" for i in range(count - len(names)))]


def ctranslate2_engine(folder: Path, compute_type: str) -> Engine:
    """An encoder that computes in a type; raises RuntimeError where it would take another."""
    import ctranslate2

    encoder = ctranslate2.Encoder(
        str(folder), device="cpu", compute_type=compute_type,
        intra_threads=torch.get_num_threads(),
    )  # fmt: skip
    if not encoder.compute_type.startswith(compute_type):  # "int8" comes back as "int8_float32"
        raise RuntimeError(f"this processor falls back from {compute_type}")

    def engine(batch: Batch) -> Run:
        sequences = [batch.ids[i, :n].tolist() for i, n in enumerate(batch.lengths)]
        return lambda: encoder.forward_batch(sequences)

    return engine


def named(family: str) -> str:
    """What a workload's name begins with."""
    return "" if family == "bert" else f"{family} "


class Engines:
    """Every wanted system of one model, prepared once for all batches.

    folder   where converted models are, or come to be
    missing  column, or a step before several, -> why it is not there
    """

    def __init__(self, arguments: argparse.Namespace, model: str, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.family, self.shape = arguments.family, MODELS[model]
        self.found: dict[str, Engine] = {}
        self.missing: dict[str, str] = {}
        self.reference = self.hf()
        with quiet():
            for precision in ("fp32", "bf16"):
                self.add_torch(precision)
            for precision in PRECISIONS:
                self.add(f"ours_{precision}", lambda p=precision: our_encoder(self.reference, p))
            self.add_onnx()
            self.add_ctranslate2()

    def hf(self) -> torch.nn.Module:
        return hf_model(self.family, self.shape, self.arguments.max_length)

    def add(self, column: str, make: Callable[[], Engine]) -> None:
        """Prepare a system, or note why not."""
        system, _, precision = column.rpartition("_")
        if not self.wants(system, precision):
            return
        if engine := self.step(column, make):
            self.found[column] = engine

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """What a step makes, None with the reason noted where it fails; its time is told."""
        say(f"preparing {name}")
        start = time.perf_counter()
        try:
            made = make()
        except Exception as error:
            self.missing[name] = reason(error)
            return None
        if (seconds := time.perf_counter() - start) > 10:
            say("")
            print(f"preparing {name} took {seconds:.0f} s", flush=True)
        return made

    def wants(self, system: str, *kinds: str) -> bool:
        """Whether a column of a system is wanted in one of some precisions."""
        return any(
            kind in self.arguments.precisions and wanted(f"{system}_{kind}", self.arguments)
            for kind in kinds
        )

    def add_torch(self, precision: str) -> None:
        """What plain torch has, in one type."""
        if not any(self.wants(name, precision) for name in ("hf", "compile", "packed", "gemms")):
            return
        own = self.reference
        dtype = precisions.get(precision).dtype
        if precision != "fp32":
            own = copy_of(own, dtype)
        plain = own
        if self.family != "bert" and self.wants("packed", precision):
            plain = hf_model("bert", self.shape, self.arguments.max_length).to(dtype)
        heads = self.shape[3]
        self.add(f"hf_{precision}", lambda: lambda batch: hf_run(own, batch))
        self.add(f"compile_{precision}", lambda: lambda batch: hf_run(torch.compile(own), batch))
        self.add(f"packed_{precision}", lambda: lambda batch: packed_run(plain, heads, batch))
        self.add(
            f"gemms_{precision}", lambda: lambda batch: gemms(self.shape, batch.total, dtype, "cpu")
        )

    def converted(self, name: str, write: Callable[[Path], None]) -> Path | None:
        """A converted model of the folder, written unless it is there; None where that fails."""

        def make() -> Path:
            path = self.folder / name
            # Exporting needs autograd's ordinary tensors.
            with torch.inference_mode(False), torch.no_grad():
                if not path.exists():
                    write(path)
            return path

        found: Path | None = self.step(f"conversion to {name}", make)
        return found

    def add_onnx(self) -> None:
        """ONNX Runtime and OpenVINO, both from one exported file."""
        runtime = self.wants("onnxruntime", "fp32", "int8")
        if not (runtime or self.wants("openvino", *PRECISIONS)):
            return
        exported = self.converted("model.onnx", lambda path: write_onnx(self.hf(), path))
        if not exported:
            return
        if runtime:
            fused = self.converted("fused.onnx", lambda p: write_fused(exported, self.shape, p))
            if fused:
                self.add("onnxruntime_fp32", lambda: onnxruntime_engine(fused))
            if fused and self.wants("onnxruntime", "int8"):
                small = self.converted("quantised.onnx", lambda p: write_quantised(fused, p))
                if small:
                    self.add("onnxruntime_int8", lambda: onnxruntime_engine(small))
        self.add("openvino_fp32", lambda: openvino_engine(exported, "f32"))
        self.add("openvino_bf16", lambda: openvino_engine(exported, "bf16"))
        if self.wants("openvino", "int8"):
            quantised = self.converted("nncf.xml", lambda path: write_nncf(exported, path))
            if quantised:
                self.add("openvino_int8", lambda: openvino_engine(quantised, None))

    def add_ctranslate2(self) -> None:
        if not self.wants("ctranslate2", *PRECISIONS):
            return
        folder = self.converted(
            "ctranslate2", lambda path: write_ctranslate2(self.family, self.shape, path)
        )
        if folder:
            for precision, name in (("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8")):
                self.add(f"ctranslate2_{precision}", lambda n=name: ctranslate2_engine(folder, n))


def reason(error: Exception) -> str:
    """One line of an error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def cpu_row(name: str, engines: Engines, batch: Batch, rounds: int) -> dict[str, Any]:
    """All systems on one batch, interleaved round by round."""
    systems: dict[str, Run] = {}
    missing = dict(engines.missing)
    turns: dict[str, int] = {}
    torch.compiler.reset()  # so that it may take this batch's shape as fixed
    for column, engine in engines.found.items():
        say(f"{name}: warming {column} up")
        try:
            run = engine(batch)
            for _ in range(2):  # the first one allocates, and may compile
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                if seconds > 1 and not column.startswith("compile"):
                    break
            turns[column] = max(1, min(20, int(TURN / seconds)))
            systems[column] = run
        except Exception as error:
            missing[column] = reason(error)
    times: dict[str, list[float]] = {column: [] for column in systems}
    for i in range(rounds):
        say(f"{name}: round {i + 1} of {rounds}")
        for column, run in systems.items():
            time.sleep(REST)
            # A short run would find another system's weights in the caches, as it would not in a
            # server: it repeats, and the first one is not counted.
            for turn in range(turns[column] + (turns[column] > 1)):
                start = time.perf_counter()
                run()
                if turn or turns[column] == 1:
                    times[column].append((time.perf_counter() - start) * 1e3)
    say("")
    reference = hf_run(engines.reference, batch)()
    return {
        "workload": name,
        "tokens": batch.total,
        "padded": batch.padded,
        "gflop": batch.gflop(*engines.shape[:3]),
        "ms": {column: statistics.median(t) for column, t in times.items()},
        "quartiles": {c: np.quantile(t, [0.25, 0.75]).tolist() for c, t in times.items()},
        "max_difference_from_hf_fp32": {
            column: difference(run(), reference, batch)
            for column, run in systems.items()
            if column.startswith("ours_")
        },
        "missing": missing,
    }


def cpu_rows(arguments: argparse.Namespace, save: Callable[[list[Any]], None]) -> list[Any]:
    """Every model with every lengths and batch; saved after each, so that a stop loses nothing."""
    rows = []
    for model in arguments.model:
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode(), quiet():
            folder = (arguments.folder or Path(scratch)) / f"{arguments.family}-{model}"
            folder.mkdir(parents=True, exist_ok=True)
            engines = Engines(arguments, model, folder)
            for lengths, count in itertools.product(arguments.lengths, arguments.batch):
                if lengths == "ragged":
                    drawn = draw_lengths(
                        lengths, count, arguments.max_length, np.random.default_rng(0)
                    )
                    longest = f" s{arguments.max_length}"
                else:
                    drawn, longest = lengths_like(lengths, count), ""
                name = f"{named(arguments.family)}{model} {lengths} b{count}{longest}"
                rows.append(cpu_row(name, engines, Batch(drawn, "cpu"), arguments.rounds))
                save(rows)
                print_cpu(rows[-1])
    return rows


def print_cpu(row: dict[str, Any]) -> None:
    """System by precision: milliseconds, and the ratio to the GEMMs alone of that precision."""
    ms = row["ms"]
    print(
        f"\n{row['workload']}: {row['tokens']} tokens, {row['padded']} padded; median ms "
        "(x the GEMMs alone)"
    )
    kinds = [p for p in PRECISIONS if any(n.endswith("_" + p) for n in ms)]
    print(f"{'system':14}" + "".join(f"{p:>22}" for p in kinds))
    for system in dict.fromkeys(name.rpartition("_")[0] for name in ms):
        line = f"{system:14}"
        for precision in kinds:
            value, floor = ms.get(f"{system}_{precision}"), ms.get(f"gemms_{precision}")
            cell = "" if value is None else f"{value:.{1 if value > 10 else 2}f}"
            line += f"{cell + (f' ({value / floor:.2f}x)' if value and floor else ''):>22}"
        print(line)
    if ours := ms.get("ours_int8"):
        others = [n for n in ms if n.endswith("_int8") or n in ("ours_fp32", "ours_bf16")]
        ratios = [f"{ours / ms[n]:.2f} x {n}" for n in others if n != "ours_int8"]
        print(f"ours_int8 takes {', '.join(ratios)}")
    for name, why in row["missing"].items():
        print(f"left out: {name}: {why}")
    for name, value in row["max_difference_from_hf_fp32"].items():
        print(f"largest difference {name} from HF fp32: {value:.2e}")
    sys.stdout.flush()


# -- GPU -----------------------------------------------------------------------------------------


class PackedLayer(torch.nn.Module):
    """One encoder layer over packed tokens, with FlashAttention 2's variable-length kernel."""

    def __init__(self, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(hidden, 3 * hidden)
        self.out = torch.nn.Linear(hidden, hidden)
        self.norm1 = torch.nn.LayerNorm(hidden, eps=1e-12)
        self.up = torch.nn.Linear(hidden, inner)
        self.down = torch.nn.Linear(inner, hidden)
        self.norm2 = torch.nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        total, hidden = x.shape
        q, k, v = self.qkv(x).view(total, 3, self.heads, hidden // self.heads).unbind(1)
        mixed = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False
        )[0]
        x = self.norm1(x + self.out(mixed.reshape(total, hidden)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class PackedStack(torch.nn.Module):
    """The encoder's layers over packed tokens."""

    def __init__(self, layers: int, hidden: int, inner: int, heads: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [PackedLayer(hidden, inner, heads) for _ in range(layers)]
        )

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, cu_seqlens, longest)
        return x


class LinearFp8(torch.nn.Module):
    """A linear layer in e4m3 as plain torch has it; its input is quantised by whatever compiles it.

    scales  "row": one an output of the weight and one a token of the input, as they come;
            "tensor": one for all of each, known beforehand
    """

    def __init__(self, source: torch.nn.Linear, scales: str) -> None:
        super().__init__()
        self.row = scales == "row"
        weight = source.weight.detach().float()
        largest = weight.abs().amax(1, keepdim=True) if self.row else weight.abs().amax()
        self.register_buffer("weight", (weight / largest * LARGEST_FP8).to(torch.float8_e4m3fn))
        scale = largest / LARGEST_FP8
        self.register_buffer("scale", scale.reshape(1, -1) if self.row else scale)
        self.register_buffer("input_scale", torch.tensor(FIXED_SCALE, device=weight.device))
        self.register_buffer("bias", source.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.input_scale
        if self.row:
            given = (x.abs().amax(1, keepdim=True).float() / LARGEST_FP8).clamp(min=1e-8)
        narrow = (x.float() / given).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
        # With scales by row torch computes in bfloat16 alone, and adds no bias.
        out = torch._scaled_mm(
            narrow, self.weight.T, scale_a=given, scale_b=self.scale, out_dtype=x.dtype,
            bias=None if self.row else self.bias, use_fast_accum=True,
        )  # fmt: skip
        return out + self.bias if self.row else out


def stack_fp8(stack: PackedStack, scales: str) -> torch.nn.Module:
    """The same layers in bfloat16 with their linear layers in e4m3."""
    made = copy_of(stack, torch.bfloat16)
    for layer in made.layers:
        for name in ("qkv", "out", "up", "down"):
            setattr(layer, name, LinearFp8(getattr(layer, name), scales))
    return made


def gemms_fp8(shape: Shape, total: int) -> Run:
    """The matrix products alone in e4m3 through cuBLASLt, scales of 1, weights of their own."""
    layers, hidden, inner, _ = shape
    sizes = [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]

    def narrow(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)

    weights = [narrow(n, k).T for _ in range(layers) for n, k in sizes]
    inputs = {k: narrow(total, k) for k in {hidden, inner}}
    one = torch.ones((), device="cuda")

    def run() -> None:
        for weight in weights:
            torch._scaled_mm(
                inputs[weight.shape[0]], weight, scale_a=one, scale_b=one,
                out_dtype=torch.float16, use_fast_accum=True,
            )  # fmt: skip

    return run


def graphed(run: Run) -> Run:
    """`run` captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_kept: Run = run) -> None:  # the graph reads what `run` holds, and keeps none of it
        graph.replay()

    return replay


def cuda_times(systems: dict[str, Run], rounds: int, iterations: int) -> dict[str, list[float]]:
    """Milliseconds by CUDA events, `rounds` x `iterations` a system, interleaved by rounds."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for run in systems.values():
        for _ in range(10):
            run()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, run in systems.items():
            run()
            for _ in range(iterations):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(end))
    return times


def kernel_profile(run: Run) -> list[dict[str, Any]]:
    """Calls and microseconds of every kernel of one forward, the dearest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name[:140], []).append(event.time_range.elapsed_us())
    rows = [{"kernel": name, "calls": len(t) / 5, "us": sum(t) / 5} for name, t in kernels.items()]
    return sorted(rows, key=lambda row: -row["us"])


def cuda_row(
    name: str, shape: Shape, batch: Batch, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All columns of one workload."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[arguments.dtype]
    layers, hidden, inner, heads = shape
    systems: dict[str, Run] = {}
    missing: dict[str, str] = {}

    def add(column: str, make: Callable[[], Run]) -> None:
        if not wanted(column, arguments):
            return
        try:
            run = make()
            run()
            torch.cuda.synchronize()
            systems[column] = run
        except Exception as error:
            missing[column] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    model = hf_model(arguments.family, shape, batch.longest).to("cuda", dtype)
    hf = hf_run(model, batch)
    ours = our_encoder(model, arguments.dtype)(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    error = difference(ours(), hf(), batch)
    torch.cuda.reset_peak_memory_stats()
    ours()
    workspace = (torch.cuda.max_memory_allocated() - before) / 2**20
    add("ours", lambda: graphed(ours))
    narrow: dict[str, Any] = {}

    def ours_fp8() -> Run:
        run = our_encoder(model, "fp8")(batch)
        narrow["max_difference_from_hf_fp8"] = difference(run(), hf(), batch)
        if arguments.kernels:
            narrow["kernels_fp8"] = kernel_profile(run)
        return graphed(run)

    add("ours_fp8", ours_fp8)
    add("ours_eager", lambda: ours)
    add("hf_sdpa", lambda: hf)
    add("hf_compile", lambda: hf_run(torch.compile(model), batch))
    add("hf_sdpa_graph", lambda: graphed(hf))
    padded = torch.randn(batch.batch, batch.longest, hidden, device="cuda", dtype=dtype)
    absent = batch.mask == 0

    def nested() -> Run:
        layer = torch.nn.TransformerEncoderLayer(
            hidden, heads, inner, activation="gelu", batch_first=True
        )
        stack = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=True)
        stack.to("cuda", dtype).eval()
        return lambda: stack(padded, src_key_padding_mask=absent)

    add("bt_nested", nested)
    packed = PackedStack(*shape).to("cuda", dtype).eval()
    x = torch.randn(batch.total, hidden, device="cuda", dtype=dtype)
    add("packed_fa2", lambda: lambda: packed(x, batch.cu_seqlens, batch.longest))
    add("packed_fa2_graph", lambda: graphed(lambda: packed(x, batch.cu_seqlens, batch.longest)))

    def compiled(stack: torch.nn.Module, x: torch.Tensor) -> Run:
        fast = torch.compile(stack)
        return graphed(lambda: fast(x, batch.cu_seqlens, batch.longest))

    add("packed_compile_graph", lambda: compiled(packed, x))
    for scales in ("row", "tensor"):
        add(f"packed_fp8_{scales}", lambda s=scales: compiled(stack_fp8(packed, s), x.bfloat16()))
    add("gemms_graph", lambda: graphed(gemms(shape, batch.total, dtype, "cuda")))
    add("gemms_fp8", lambda: graphed(gemms_fp8(shape, batch.total)))
    times = cuda_times(systems, arguments.rounds, arguments.iterations)
    ms = {column: statistics.median(t) for column, t in times.items()}
    row: dict[str, Any] = {
        "workload": name,
        "tokens": batch.total,
        "padded": batch.padded,
        "gflop": batch.gflop(*shape[:3]),
        "weight_mib": layers * (4 * hidden * hidden + 2 * hidden * inner) * 2 / 2**20,
        "ms": ms,
        "sequences_per_s": {column: batch.batch / t * 1e3 for column, t in ms.items()},
        "max_difference_from_hf": error,
        **narrow,
        "workspace_mib": workspace,
        "missing": missing,
    }
    if "ours" in ms:
        row["tflops"] = row["gflop"] / ms["ours"]
        row["gb_per_s"] = batch.gbyte(*shape[:3]) / ms["ours"] * 1e3
        # Shares of the two ceilings: the larger one says what bounds the row.
        if ceilings := CEILINGS.get(torch.cuda.get_device_name()):
            row["of_ceilings"] = [row["tflops"] / ceilings[0], row["gb_per_s"] / ceilings[1]]
    if arguments.kernels:
        row["kernels"] = kernel_profile(ours)
    torch.compiler.reset()
    return row


def cuda_rows(arguments: argparse.Namespace, save: Callable[[list[Any]], None]) -> list[Any]:
    """Every selected workload; saved after each, so that a stop loses nothing."""
    rows = []
    for name, model, lengths in workloads(arguments.rows, named(arguments.family)):
        # no_grad, not inference_mode: torch.compile reuses what the eager columns made.
        with torch.no_grad(), quiet():
            row = cuda_row(name, MODELS[model], Batch(lengths, "cuda"), arguments)
        torch.cuda.empty_cache()
        rows.append(row)
        save(rows)
        print_cuda(row)
    return rows


def print_cuda(row: dict[str, Any]) -> None:
    """One line a row: milliseconds of every column and the two ratios that matter."""
    ms = row["ms"]
    cells = " ".join(f"{column} {value:.3f}" for column, value in ms.items())
    line = f"{row['workload']} T={row['tokens']} | {cells}"
    others = {c: v for c, v in ms.items() if not c.startswith(("ours", "gemms"))}
    wide = [v for c, v in others.items() if "fp8" not in c]
    if "ours" in ms:
        if wide:
            line += f" | best other x{ms['ours'] / min(wide):.3f}"
        if "gemms_graph" in ms:
            line += f" | GEMMs x{ms['ours'] / ms['gemms_graph']:.3f}"
        line += f" | {row['tflops']:.0f} TFLOP/s {row['gb_per_s']:.0f} GB/s"
    print(line + f" | diff {row['max_difference_from_hf']:.1e}", flush=True)
    if "ours_fp8" in ms:
        beside = {"gemms_fp8", "ours", *(c for c in others if c.startswith("packed"))}
        ratios = [f"{c} x{ms['ours_fp8'] / v:.3f}" for c, v in ms.items() if c in beside]
        error = row["max_difference_from_hf_fp8"]
        print(f"  ours_fp8: {' '.join(ratios)} | diff {error:.1e}", flush=True)
    if "squad" in row["workload"]:
        rates = [f"{c} {v:.0f}" for c, v in row["sequences_per_s"].items()]
        print(f"  sequences/s: {' '.join(rates)}", flush=True)
    for column, why in row["missing"].items():
        print(f"  left out: {column}: {why}", flush=True)


# -- both ----------------------------------------------------------------------------------------


class quiet(warnings.catch_warnings):
    """Silence the warnings and logs of other engines; our warnings raise in the tests."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self.logged = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *raised: Any) -> None:
        logging.disable(self.logged)
        super().__exit__(*raised)


def wanted(column: str, arguments: argparse.Namespace) -> bool:
    """Whether --columns and --skip leave a column in; both take whole names or prefixes."""

    def named(names: list[str]) -> bool:
        return any(column == n or column.startswith(n + "_") for n in names)

    return not named(arguments.skip) and (not arguments.columns or named(arguments.columns))


def say(message: str) -> None:
    """Progress on a terminal, nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars, shorter is better: one a system for a single row, else one group a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if len(rows) == 1:
        ms = dict(sorted(rows[0]["ms"].items(), key=lambda item: -item[1]))
        figure, axis = pyplot.subplots(figsize=(8, 0.35 * len(ms) + 1), layout="constrained")
        colours = ["black" if name.startswith("ours") else "tab:blue" for name in ms]
        bars = axis.barh(list(ms), list(ms.values()), color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axis.set_xlabel("milliseconds, median")
        axis.set_title(f"{rows[0]['workload']}, {rows[0]['tokens']} tokens", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        return
    columns = list(dict.fromkeys(column for row in rows for column in row["ms"]))
    figure, axis = pyplot.subplots(figsize=(1.2 * len(rows) + 2, 5), layout="constrained")
    width = 0.85 / len(columns)
    palette = pyplot.get_cmap("tab10")
    for i, column in enumerate(columns):
        places = [j + i * width for j, row in enumerate(rows) if column in row["ms"]]
        heights = [row["ms"][column] for row in rows if column in row["ms"]]
        colour = {"ours": "black", "ours_eager": "dimgray"}.get(column, palette(i % 10))
        axis.bar(places, heights, width, label=column, color=colour)
    middle = width * (len(columns) - 1) / 2
    axis.set_xticks([j + middle for j in range(len(rows))])
    axis.set_xticklabels([row["workload"] for row in rows], rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("milliseconds, median")
    axis.set_yscale("log")
    axis.legend(fontsize=7, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def arguments_of(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--family", choices=FAMILIES, default="bert")
    parser.add_argument("--columns", nargs="*", default=[], help="only these columns")
    parser.add_argument("--skip", nargs="*", default=[], help="columns to leave out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results/)")
    parser.add_argument("--no-plot", action="store_true")
    cpu = parser.add_argument_group("cpu")
    cpu.add_argument("--model", nargs="+", choices=tuple(MODELS), default=["base"])
    cpu.add_argument("--batch", nargs="+", type=int, default=[16], help="texts in a batch")
    cpu.add_argument(
        "--lengths", nargs="+", default=["ragged"], choices=("ragged", "sst2", "squad"),
        help="drawn evenly, or those of a set",
    )  # fmt: skip
    cpu.add_argument("--max-length", type=int, default=128, help="of ragged batches")
    cpu.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    cpu.add_argument(
        "--folder", type=Path, help="keep converted models here and use those that are there"
    )
    cpu.add_argument("--threads", type=int, help="default: all processors")
    gpu = parser.add_argument_group("cuda")
    gpu.add_argument(
        "--rows", nargs="*", default=[], help="only rows whose name holds one of these"
    )
    gpu.add_argument("--iterations", type=int, default=20, help="a round")
    gpu.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    gpu.add_argument("--kernels", action="store_true", help="profile ours by kernel, FP8 too")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    arguments = arguments_of(given)
    torch.manual_seed(0)
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    load_library()
    if arguments.device == "cuda":
        table.load_table()  # as the handler does
    record = provenance(library=build_info())
    stamp = record["date"][:10]
    default = RESULTS / f"{device_name(arguments.device)}-encoder-{stamp}.json"
    out: Path = arguments.out or default
    out.parent.mkdir(parents=True, exist_ok=True)

    def save(rows: list[Any]) -> None:
        out.write_text(json.dumps({"provenance": record, "rows": rows}, indent=1) + "\n")

    rows = (cpu_rows if arguments.device == "cpu" else cuda_rows)(arguments, save)
    print(f"written: {out}")
    if not arguments.no_plot and rows:
        try:
            plot(rows, out.with_suffix(".png"))
            print(f"plotted: {out.with_suffix('.png')}")
        except ImportError:
            print("no plot: matplotlib is not installed (pip install 'ft-handler[bench]')")


if __name__ == "__main__":
    main()
