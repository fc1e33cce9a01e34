"""Requests a second with the buffered reader of TorchServe's protocol, and with the stock one.

    python benchmarks/receive.py build/sentiment --connections 64 --rounds 6

One TorchServe, the same traced model twice, with `fast_receive` on and off; the two are asked in
turn, round by round. The smaller the model, the larger the reader's share, so a tiny model shows
the most that it can gain. Beside requests a second stands the processor time that the worker took
for each, which other work on the machine hardly touches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ft_handler.servers.torchserve.archive import archive
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import ServeOptions

sys.path.insert(0, str(Path(__file__).resolve().parent))
from load import load
from provenance import provenance
from serving import free_ports

HERE = Path(__file__).resolve().parent
SYSTEMS = {"buffered": True, "stock": False}


def pack(traced: Path, folder: Path, batch_size: int) -> None:
    """Both archives of the traced folder, alike but for the one setting."""
    (folder / "store").mkdir()
    for name, fast in SYSTEMS.items():
        copy = folder / name
        shutil.copytree(traced, copy)
        path = copy / "model-config.yaml"
        settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings.update(batchSize=batch_size, maxBatchDelay=5, minWorkers=1, maxWorkers=1)
        handler = {"fast_receive": fast, "num_threads": 1}  # idle threads would spin beside it
        settings["handler"] = {**settings.get("handler", {}), **handler}
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        archive(copy, model_name=name, export_path=folder / "store")


def processor_seconds(pid: int) -> float:
    """What a process has taken so far, its own and the kernel's for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description="The buffered reader beside TorchServe's own")
    parser.add_argument("traced", type=Path, help="folder that `ft-handler trace` wrote")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results/)")
    arguments = parser.parse_args()
    record = provenance(note=arguments.note)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ft_bench_") as scratch:
        folder = Path(scratch)
        pack(arguments.traced, folder, arguments.batch_size)
        rng = random.Random(0)
        words = ("a", "the", "film", "story", "two", "old", "friends", "great", "was", "of")
        bodies = folder / "bodies.txt"
        bodies.write_text("\n".join(" ".join(rng.choices(words, k=18)) for _ in range(500)))
        port = free_ports(5)
        options = ServeOptions(
            model_store=folder / "store", models=("all",), token_auth=False, port=port,
            grpc_port=port + 3, overrides={"job_queue_size": "2000"},
        )  # fmt: skip
        with (folder / "server.log").open("w") as log, Server(options, cwd=folder, output=log) as s:
            s.wait_ready(120)
            for number in range(-1, arguments.rounds):  # the first one warms up
                for name in SYSTEMS if number % 2 else reversed(SYSTEMS):
                    url = f"{s.inference}/predictions/{name}"
                    (worker,) = s.describe(name)["workers"]
                    before = processor_seconds(worker["pid"])
                    found = load(
                        url, bodies, "text/plain", arguments.connections, arguments.seconds
                    )
                    took = processor_seconds(worker["pid"]) - before
                    if number < 0:
                        continue
                    found["worker_us"] = took / found["requests"] * 1e6
                    rows.append({"system": name, "round": number, **found})
                    print(
                        f"{number} {name:10} {found['requests_per_s']:8.0f}/s, "
                        f"{found['worker_us']:6.0f} us of the worker a request",
                        flush=True,
                    )
    out = arguments.out or HERE / "results" / f"cpu-receive-{record['date'][:10]}.json"
    out.write_text(json.dumps({"provenance": record, "rows": rows}, indent=1) + "\n")
    for name in SYSTEMS:
        for column in ("requests_per_s", "worker_us"):
            found = [row[column] for row in rows if row["system"] == name]
            median = statistics.median(found)
            print(f"{name} {column}: median {median:.0f}, {min(found):.0f} to {max(found):.0f}")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
