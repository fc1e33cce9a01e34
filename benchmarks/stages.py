"""Time of each stage of the request path, with the real encoder or with one that costs nothing.

    python benchmarks/stages.py --model DIR [--batch 32] [--engine real|replay|device|instant]
        [--device cpu|cuda] [--least-part BYTES] [--form text|json|parsed] [--bodies FILE]

DIR is what `ft-handler trace` wrote. The texts are the SST-2 sentences or SQuAD questions of
FT_HANDLER_SHARED, else random words of typical lengths; `--bodies` takes a file of them, one a
line, as `serving.make_bodies` writes it. `device` replays logits, but only when a device that
works beside the host would have them; "compute" is then the time spent waiting for it. `instant`
gives random logits at once, to batches in parts as on a GPU, whatever the model computes: it shows
the host's work alone, on any machine, with a model of any size. `real` computes, on a GPU with
`--device cuda`, where `--least-part` bounds the parts of a batch. `parsed` hands JSON over as a
server's worker does that has parsed it. Prints microseconds a request, wall time by stage and the
processor's time of the whole, and the share of the batch's time; `--output` writes JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ft_handler import load_model, tasks
from ft_handler.config import CoreSettings, RawSettings
from ft_handler.engine.base import Done, Engine
from ft_handler.engine.select import engine_for
from ft_handler.request.overlap import LEAST_PART_BYTES
from ft_handler.request.pipeline import Pipeline
from ft_handler.runtime import load_gemm_plans, loaded_of, settle
from ft_handler.servers.torchserve.adapter import incoming
from ft_handler.stats import STAGES, BatchStats
from ft_handler.types import Floats, PackedBatch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance

ENGINES = ("real", "replay", "device", "instant")
SHARED = Path(os.environ.get("FT_HANDLER_SHARED") or Path(__file__).resolve().parents[2] / "shared")


class ReplayEngine:
    """Answers at once with logits it has seen, so that only the handler's own Python is left."""

    overlaps = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[tuple[int, bytes], Floats] = {}

    def launch(self, batch: PackedBatch) -> ReplayEngine:
        key = batch.total, batch.input_ids[:512].tobytes()
        if key not in self._seen:
            self._seen[key] = self._engine.launch(batch).result()
        self._logits = self._seen[key]
        return self

    def result(self) -> Floats:
        return self._logits

    def warm_up(self) -> dict[str, float]:
        return self._engine.warm_up()


class DeviceEngine:
    """Replays logits as late as a device has them that works beside the host.

    launch_seconds, token_seconds   what a batch takes there: so much, and so much more a token
    """

    overlaps = True

    def __init__(self, replay: ReplayEngine, launch_seconds: float, token_seconds: float) -> None:
        self._replay, self._launch, self._token = replay, launch_seconds, token_seconds
        self._busy_until = 0.0

    def launch(self, batch: PackedBatch) -> DeviceBatch:
        logits = self._replay.launch(batch).result()
        begin = max(time.perf_counter(), self._busy_until)
        self._busy_until = begin + self._launch + self._token * batch.total
        return DeviceBatch(logits, self._busy_until)

    def warm_up(self) -> dict[str, float]:
        return self._replay.warm_up()


class DeviceBatch:
    """A batch that is ready at a point in time."""

    def __init__(self, logits: Floats, ready: float) -> None:
        self._logits, self._ready = logits, ready

    def result(self) -> Floats:
        while time.perf_counter() < self._ready:  # sleeping would be too coarse
            pass
        return self._logits


class InstantEngine:
    """Answers at once with random logits."""

    overlaps = True

    def __init__(self, columns: int, per_token: bool) -> None:
        self._columns, self._per_token = columns, per_token
        rng = np.random.default_rng(0)
        self._logits = rng.normal(0, 4, columns << 18).astype(np.float32)

    def launch(self, batch: PackedBatch) -> Done:
        rows = batch.total if self._per_token else batch.batch
        shape = (self._columns, rows) if self._per_token else (rows, self._columns)
        return Done(self._logits[: self._columns * rows].reshape(shape))

    def warm_up(self) -> dict[str, float]:
        return {}


def inputs_of(mode: str, count: int) -> list[Any]:
    """Real texts where they are, random words elsewhere."""
    rng = random.Random(0)
    if mode == "sequence_classification":
        path = SHARED / "data/sst2/dev.tsv"
        if path.is_file():
            rows = path.read_text(encoding="utf-8").splitlines()[1:]
            texts = [row.split("\t")[1] for row in rows]
        else:
            texts = [" ".join(["a warm film"] * rng.randint(2, 14)) for _ in range(872)]
        rng.shuffle(texts)
        return [texts[i % len(texts)] for i in range(count)]
    path = SHARED / "data/squad/dev-v1.1.json.gz"
    if path.is_file():
        data = json.loads(gzip.decompress(path.read_bytes()))["data"]
        pairs = [
            {"question": q["question"], "context": p["context"]}
            for article in data
            for p in article["paragraphs"]
            for q in p["qas"]
        ]
    else:
        pairs = [
            {"question": "who was it", "context": " ".join(["an old bridge"] * rng.randint(20, 90))}
            for _ in range(500)
        ]
    rng.shuffle(pairs)
    return [pairs[i % len(pairs)] for i in range(count)]


def read_bodies(mode: str, path: Path, count: int) -> list[Any]:
    """The first `count` lines of a file, from the beginning again where it has fewer."""
    lines = path.read_text(encoding="utf-8").splitlines()
    question = mode == "question_answering"
    inputs = [json.loads(line) if question else line for line in lines]
    return [inputs[i % len(inputs)] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=27)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, default="real")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of `real`")
    parser.add_argument("--least-part", type=int, default=LEAST_PART_BYTES, help="bytes of text")
    parser.add_argument("--device-us", type=float, default=220, help="of `device`, a launch")
    parser.add_argument("--device-ns", type=float, default=325, help="of `device`, a token")
    parser.add_argument("--bodies", type=Path, help="texts, or JSON objects, one a line")
    parser.add_argument("--form", choices=("text", "json", "parsed"), default="text")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = load_model(args.model / "traced_model.pt", device)
    if args.device == "cuda":
        load_gemm_plans(args.model, device)
    engine = engine_for(
        model, device, max_tokens=CoreSettings().max_batch_tokens, max_sequences=args.batch
    )
    if args.engine == "instant":
        per_token = tasks.get(model.info.mode).per_token
        engine = InstantEngine(model.info.num_labels, per_token)
    elif args.engine != "real":
        engine = replay = ReplayEngine(engine)
    if args.engine == "device":
        engine = DeviceEngine(replay, args.device_us * 1e-6, args.device_ns * 1e-9)
    seen: list[BatchStats] = []
    clock = time.perf_counter
    engine.warm_up()
    count = args.batch * args.batches
    if args.bodies:
        inputs = read_bodies(model.info.mode, args.bodies, count)
    else:
        inputs = inputs_of(model.info.mode, count)
    raw: list[dict[str, Any]] = []
    for item in inputs:
        if isinstance(item, str) and args.form == "text":
            raw.append({"body": item})
        else:
            document = {"text": item} if isinstance(item, str) else item
            encoded = bytearray(json.dumps(document).encode())
            raw.append({"body": document if args.form == "parsed" else encoded})
    batches = [raw[i : i + args.batch] for i in range(0, len(raw), args.batch)]
    settled = settle(args.model, RawSettings({}))

    def new_pipeline() -> Pipeline[Any, Any, Any]:
        return Pipeline(
            settled.task,
            settled.task.runner(settled.own, loaded_of(settled, args.model)),
            engine,
            settled.core,
            max_positions=model.info.max_positions,
            model={"model_name": "model"},
            least_part=args.least_part,
        )

    # A new pipeline meets every text for the first time; of several, the best pass of each batch.
    cold: list[list[float]] = []
    for _ in range(5):
        pipeline = new_pipeline()
        for batch in batches:
            seen.append(pipeline.run([incoming(item) for item in batch])[1])
        host_only = [sum(b.seconds.values()) - b.seconds["compute"] for b in seen]
        cold.append(host_only)
        seen.clear()
    first_pass = statistics.mean(map(min, zip(*cold, strict=True)))
    walls, processor = [], []
    for _ in range(args.rounds):
        for batch in batches:
            start, spent = clock(), time.thread_time()
            stats = pipeline.run([incoming(item) for item in batch])[1]
            walls.append(clock() - start)
            processor.append(time.thread_time() - spent)
            seen.append(stats)
    if failed := sum(batch.failed for batch in seen):
        raise SystemExit(f"error: {failed} requests failed")
    # Of every batch the best round, which a busy machine disturbs least; then the mean.
    count = len(batches)
    typical = {
        stage: statistics.mean(
            min(b.seconds[stage] for b in seen[at::count]) for at in range(count)
        )
        for stage in STAGES
    }
    total = sum(typical.values())
    host = total - typical["compute"]
    result = {
        "provenance": provenance(
            model=f"{model.info.num_layers} layers of {model.info.hidden_size}, "
            f"{model.info.data_type}",
            engine=args.engine,
            form=args.form,
        ),
        "mode": model.info.mode,
        "batch": args.batch,
        "tokens_per_batch": statistics.mean(b.tokens for b in seen),
        "us_per_request": {s: round(m / args.batch * 1e6, 2) for s, m in typical.items()},
        "run_us_per_request": round(
            statistics.mean(min(walls[at::count]) for at in range(count)) / args.batch * 1e6, 2
        ),
        "processor_us_per_request": {
            "least": round(
                statistics.mean(min(processor[i::count]) for i in range(count)) / args.batch * 1e6,
                2,
            ),
            "median": round(statistics.median(processor) / args.batch * 1e6, 2),
        },
        "host_us_per_request": round(host / args.batch * 1e6, 2),
        "host_us_per_request_first_pass": round(first_pass / args.batch * 1e6, 2),
        "host_share": round(host / total, 4),
    }
    print(f"{'stage':<12}{'us/request':>12}{'share':>9}")
    for stage, seconds in typical.items():
        print(f"{stage:<12}{seconds / args.batch * 1e6:>12.2f}{seconds / total:>9.1%}")
    print(f"{'host':<12}{host / args.batch * 1e6:>12.2f}{host / total:>9.1%}")
    print(f"{'wall':<12}{result['run_us_per_request']:>12.2f}")
    spent = result["processor_us_per_request"]
    print(f"{'processor':<12}{spent['least']:>12.2f}, median {spent['median']:.2f}")
    print(f"host, texts met for the first time: {result['host_us_per_request_first_pass']:.2f}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
