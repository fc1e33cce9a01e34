"""Where a figure comes from: machine, versions, commit, command line."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "ft-handler", "torch", "transformers", "numpy", "tokenizers", "torchserve", "onnxruntime",
    "openvino", "nncf", "ctranslate2", "triton",
)  # fmt: skip
#: What chooses instruction sets, by the engine that reads it.
CHOICES = (
    "FT_HANDLER_CPU_ISA",
    "CT2_FORCE_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    named = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return named[1] if named else platform.machine()


def commit() -> str:
    """FT_HANDLER_COMMIT, else the clone's; `+changes` when tracked files differ from it."""
    if given := os.environ.get("FT_HANDLER_COMMIT"):  # a copy of the tree without its history
        return given
    revision = _run("git", "rev-parse", "HEAD")
    if not revision:
        return "unknown"
    return revision + ("+changes" if _run("git", "status", "--porcelain", "-uno") else "")


def versions() -> dict[str, str]:
    """Versions of the packages a figure depends on, those installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """`cpu`, or a GPU's name as a file name has it: NVIDIA H200 -> h200."""
    if device == "cpu":
        return "cpu"
    import torch

    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def provenance(**more: Any) -> dict[str, Any]:
    """Everything a reader needs to judge a figure or to make it again."""
    import torch

    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        # Folders of one machine's say nothing on another.
        "command": " ".join(
            [
                "python",
                sys.argv[0],
                *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]),
            ]
        ),
        "cpu": cpu_model(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "environment": {name: os.environ[name] for name in CHOICES if name in os.environ},
        "versions": versions(),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
        record["driver"] = _run(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ).split("\n")[0]
    return {**record, **more}
