"""Memory of a worker and of TorchServe's Java, through a real server: what sizing starts from.

    python benchmarks/worker_memory.py [--models minilm base large] [--out FILE]

Weights are random; sizes are those of the named models. Each server has one worker, which answers
a list of 32 texts of 512 tokens, the largest batch of the default settings. Figures are
bytes of resident memory (`VmHWM`, `VmRSS`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from ft_handler.servers.torchserve.archive import archive
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import ServeOptions

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance
from serving import MODELS, make_checkpoint, trace_ours, vocabulary_folder

#: As many tokens as a batch has at most, `max_batch_tokens`.
TEXTS, TOKENS = 32, 512


def resident(pid: int) -> dict[str, int]:
    """Bytes of a process: the most it had, and what it has."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(Vm\w+):\s+(\d+) kB", status, re.M)
    }
    return {"peak": found["VmHWM"], "now": found["VmRSS"]}


def measure(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """One model: its file, its worker before and after work, and Java."""
    make_checkpoint("sst2", MODELS[name], vocabulary_folder(), folder / "checkpoint")
    trace_ours("sst2", folder / "checkpoint", precision, folder / "model")
    # However busy the machine, the list is not too large.
    file = folder / "model" / "model-config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["responseTimeout"] = 600
    settings["handler"].update(max_request_tokens=1 << 20, max_work_tokens=1 << 20)
    file.write_text(yaml.safe_dump(settings))
    store = folder / "store"
    archive(folder / "model", model_name="model", export_path=store)
    options = ServeOptions(model_store=store, token_auth=False, port=23100, grpc_port=23103)
    with Server(options, cwd=folder, output=sys.stderr) as server:
        server.wait_ready(300)
        (worker,) = server.describe("model")["workers"]
        loaded = resident(worker["pid"])
        body = json.dumps([" ".join(["film"] * (TOKENS - 2))] * TEXTS).encode()
        answers = server.request(f"{server.inference}/predictions/model", body, "POST", timeout=600)
        assert len(answers) == TEXTS
        return {
            "model": name,
            "precision": precision,
            "traced_file": (folder / "model" / "traced_model.pt").stat().st_size,
            "worker_loaded": loaded["now"],
            "worker_peak": resident(worker["pid"])["peak"],
            "java_peak": resident(server.pid)["peak"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["minilm", "base"])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, arguments.precision, Path(folder)))
        print(json.dumps(rows[-1]))
    if arguments.out:
        record = {"provenance": provenance(), "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
