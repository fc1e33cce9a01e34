"""Requests a second and latencies of one traced folder behind TorchServe, Ray Serve and KServe.

    scripts/environments.sh && python benchmarks/fronts.py

All three run at once on this machine, each with one worker that has all threads and the same batch
size, and are asked the same KServe v1 bodies in turns, round by round; medians are reported. Before
that, answers are compared: a front that answers otherwise than the model in this process ends the
run. Weights and texts are those of serving.py: random, with the lengths of SST-2 and SQuAD.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ft_handler import build_info, load_library
from ft_handler.predictor import Predictor
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import ServeOptions

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import serving
from load import load
from provenance import device_name, provenance
from ray_cluster import Cluster

HERE = Path(__file__).resolve().parent
BATCH_SIZE, DELAY_MS = 32, 5
SERVERS = HERE.parent / "build" / "servers"
FRONTS = ("torchserve", "ray", "kserve")


class Mix(NamedTuple):
    """A model, and what it is asked: KServe v1 bodies, one a line."""

    name: str
    folder: Path
    bodies: Path


def prepare(arguments: argparse.Namespace, folder: Path) -> Mix:
    """Trace and archive a model, and write what it is asked."""
    wanted = argparse.Namespace(
        **vars(arguments), mixes=[arguments.mix], systems=["ours"], batch_size=[BATCH_SIZE]
    )
    (system,) = serving.prepare(wanted, folder).values()
    lines = system["bodies"].read_text().splitlines()
    texts = lines if system["kind"] == "text/plain" else map(json.loads, lines)
    bodies = system["bodies"].with_suffix(".jsonl")
    bodies.write_text("".join(json.dumps({"instances": [text]}) + "\n" for text in texts))
    return Mix(system["archive"], folder / system["archive"], bodies)


@contextmanager
def torchserve(mix: Mix, folder: Path) -> Iterator[str]:
    """TorchServe with the model; yields its address."""
    port = serving.free_ports(5)
    options = ServeOptions(
        model_store=folder / "store", models=("none",), token_auth=False, model_api=True,
        port=port, grpc_port=port + 3, overrides={"job_queue_size": "2000"},
    )  # fmt: skip
    query = (
        f"url={mix.name}.mar&model_name={mix.name}&batch_size={BATCH_SIZE}"
        f"&max_batch_delay={DELAY_MS}&initial_workers=1&synchronous=true"
    )
    with (
        (folder / "torchserve.log").open("w") as log,
        Server(options, cwd=folder, output=log) as server,
    ):
        server.wait_ready(120)
        server.request(f"{server.management}/models?{query}", b"", "POST", timeout=300)
        yield server.inference


@contextmanager
def ray(mix: Mix, folder: Path) -> Iterator[str]:
    """Ray Serve with the model; yields its address."""
    cpus = len(os.sched_getaffinity(0))
    application = {
        "name": "models", "route_prefix": "/", "import_path": "ft_handler.servers.ray:app",
        "args": {
            "model": str(mix.folder), "name": mix.name, "num_cpus": cpus,
            "max_batch_size": BATCH_SIZE, "max_batch_delay": DELAY_MS,
        },
    }  # fmt: skip
    with Cluster([application], cpus=cpus) as cluster:
        cluster.wait_ready()
        yield cluster.url


@contextmanager
def kserve(mix: Mix, folder: Path) -> Iterator[str]:
    """KServe's server with the model; yields its address."""
    port = serving.free_ports(5)
    command = [
        SERVERS / "kserve/bin/python", "-m", "ft_handler.servers.kserve",
        f"--model_name={mix.name}", f"--model_dir={mix.folder}",
        f"--http_port={port}", f"--grpc_port={port + 1}",
    ]  # fmt: skip
    with (folder / "kserve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def ask(url: str, body: bytes) -> Any:
    """The answer to one body; raises URLError."""
    call = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        return json.loads(answer.read())


def wait_answer(url: str, body: bytes) -> None:
    """Wait until a front answers."""
    deadline = time.monotonic() + 180
    while True:
        try:
            ask(url, body)
            return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def agree(one: Any, other: Any) -> bool:
    """Whether two answers are the same, numbers to within what a batch changes."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-5)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(agree, one, other))
    return bool(one == other)


def compare(mix: Mix, urls: dict[str, str], count: int = 32) -> None:
    """End the run where a front's answers are not those of the model in this process."""
    predictor = Predictor.load(mix.folder)
    for line in mix.bodies.read_bytes().splitlines()[:count]:
        expected = predictor.predict(json.loads(line))
        for front, url in urls.items():
            if not agree(ask(url, line), expected):
                raise SystemExit(f"error: {front} answers {mix.name} otherwise")


def measure(mix: Mix, urls: dict[str, str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every front and number of connections."""
    rows = []
    for connections in arguments.connections:
        found: dict[str, list[dict[str, float]]] = {front: [] for front in urls}
        for turn in range(arguments.rounds):
            for front, url in urls.items():
                asked = (url, mix.bodies, "application/json", connections)
                if turn == 0:
                    load(*asked, arguments.warm_up)
                found[front].append(load(*asked, arguments.seconds))
        for front, figures in found.items():
            row: dict[str, Any] = {"front": front, "model": mix.name, "connections": connections}
            for key in ("requests_per_s", "p50_ms", "p99_ms"):
                row[key] = statistics.median(f[key] for f in figures)
            row["errors"] = sum(f["errors"] for f in figures)
            row["rounds"] = figures
            rows.append(row)
            print(
                f"{front:10} {mix.name:11} connections {connections:3} "
                f"{row['requests_per_s']:8.1f} req/s  p50 {row['p50_ms']:7.1f} ms  "
                f"p99 {row['p99_ms']:7.1f} ms  errors {row['errors']:.0f}",
                flush=True,
            )
    return rows


def version(front: str) -> str:
    """The version of a front that has an environment of its own."""
    code = f"import importlib.metadata as m; print(m.version({front!r}))"
    command = [SERVERS / front / "bin/python", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fronts", nargs="+", default=list(FRONTS), choices=FRONTS)
    parser.add_argument("--model", choices=tuple(serving.MODELS), default="minilm")
    parser.add_argument("--mix", choices=tuple(serving.MIXES), default="sst2")
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="a measurement")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds, once a measurement")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results/)")
    arguments = parser.parse_args(given)
    arguments.device, arguments.precision, arguments.setting = "cpu", ["fp32"], []
    load_library()
    record = provenance(
        library=build_info(), model=arguments.model, precision=arguments.precision[0],
        fronts={front: version(front) for front in arguments.fronts if front != "torchserve"},
    )  # fmt: skip
    date = record["date"][:10]
    out = arguments.out or HERE / "results" / f"{device_name('cpu')}-fronts-{date}.json"
    started = {"torchserve": torchserve, "ray": ray, "kserve": kserve}
    with tempfile.TemporaryDirectory(prefix="ft_bench_") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        mix = prepare(arguments, folder)
        urls = {}
        for front in arguments.fronts:
            address = stack.enter_context(started[front](mix, folder))
            urls[front] = f"{address}/v1/models/{mix.name}:predict"
            wait_answer(urls[front], mix.bodies.read_bytes().split(b"\n", 1)[0])
            print(f"{front} is ready", flush=True)
        compare(mix, urls)
        rows = measure(mix, urls, arguments)
    out.write_text(json.dumps({"provenance": record, "rows": rows}, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
