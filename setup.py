"""Builds ft_handler/lib/libpyt_fastertransformer.so; metadata lives in pyproject.toml.

The library is plain C++ on torch's stable ABI (2.10 and later): it links torch, not Python, so
one `py3-none-<platform>` wheel serves every Python and every torch from 2.10 on. The build needs
torch's headers only and takes them from the torch that is installed beside the interpreter, also
from inside pip's isolated build environment.

Environment:
  FT_HANDLER_CUDA=0|1    leave the CUDA backend out, or demand it (default: when nvcc is found)
  TORCH_CUDA_ARCH_LIST   such as "8.0;9.0" (default: every architecture the toolkit knows from 7.5)
  CUDA_HOME              where the toolkit is (default: beside nvcc)
  MAX_JOBS               compile jobs (default: processors, bounded by free memory)
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "libpyt_fastertransformer.so"
TORCH_TARGET = "0x020a000000000000"  # stable ABI of torch 2.10
ARCHITECTURES_CUDA_13 = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
ARCHITECTURES_CUDA_12 = ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0"]

# A source whose name ends so is compiled with these flags and entered only after a run-time check.
X86_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "_avx512bf16": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16",
        "-mavx2", "-mfma", "-mf16c",
    ],
    "_amx": [
        "-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
        "-mavx512bf16", "-mavx2", "-mfma", "-mf16c",
    ],
}  # fmt: skip


class BuildError(SystemExit):
    """One clear line, no traceback."""


def site_packages() -> list[Path]:
    """Where packages of this interpreter live, also seen from pip's isolated environment."""
    # An isolated build hides site-packages from sys.path but keeps sys.prefix.
    found = [Path(p) for p in sys.path if p.endswith("-packages")]
    found += [Path(sysconfig.get_paths()[k]) for k in ("purelib", "platlib")]
    return list(dict.fromkeys(found))


def find_torch() -> Path:
    """The installed torch's folder; it must carry the stable ABI's headers."""
    places = [d / "torch" for d in site_packages()]
    for torch in places:
        if (torch / "include/torch/csrc/stable/library.h").exists():
            version = (torch / "version.py").read_text()
            match = re.search(r"__version__ = '(\d+)\.(\d+)", version)
            if match and (int(match[1]), int(match[2])) < (2, 10):
                raise BuildError(
                    f"ft_handler: torch {match[1]}.{match[2]} in {torch} is too old; "
                    "2.10 is the least"
                )
            return torch
    raise BuildError(
        "ft_handler: building needs torch 2.10 or later installed first (pip install torch); "
        "looked in " + ", ".join(map(str, places)) + ". With a build front end that makes its own "
        "environment (python -m build, uv), add its --no-isolation / --no-build-isolation option."
    )


def nvcc_path() -> Path | None:
    """nvcc, or None where there is none or FT_HANDLER_CUDA=0."""
    wanted = os.environ.get("FT_HANDLER_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"ft_handler: FT_HANDLER_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc")
    if not home and not found and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    if found and Path(found).exists():
        return Path(found)
    if wanted == "1":
        raise BuildError(
            "ft_handler: FT_HANDLER_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME"
        )
    return None


def cuda_root(nvcc: Path) -> Path:
    """The toolkit's folder: what nvcc itself says, since a wrapper may stand on PATH."""
    out = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"#\$ TOP=(.*)", out)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def find_header(name: str, folders: list[Path]) -> Path | None:
    """The first folder that holds `name`."""
    return next((f for f in folders if (f / name).exists()), None)


def wheel_includes() -> list[Path]:
    """Include folders of NVIDIA's wheels, where installed."""
    return [
        folder
        for site in site_packages() + [Path(p) for p in sys.path]
        for folder in sorted(site.glob("nvidia/*/include"))
    ]


def cuda_build_requirements() -> list[str]:
    """Header wheels a CUDA build still lacks."""
    nvcc = nvcc_path()
    if nvcc is None:
        return []
    folders = [cuda_root(nvcc) / "include", *wheel_includes()]
    wheels = []
    if not find_header("cublasLt.h", folders):
        wheels.append(
            "nvidia-cublas>=13,<14"
            if nvcc_version(nvcc) >= (13, 0)
            else "nvidia-cublas-cu12>=12,<13"
        )
    return wheels


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """Such as (13, 0)."""
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", out)
    if not match:
        raise BuildError(f"ft_handler: {nvcc} --version prints no release")
    return int(match[1]), int(match[2])


def architectures(nvcc: Path) -> list[str]:
    """Such as ["8.0", "9.0"]; a "+PTX" suffix of TORCH_CUDA_ARCH_LIST is kept."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed:
        return [a for a in re.split(r"[;,\s]+", listed) if a]
    known = ARCHITECTURES_CUDA_13 if nvcc_version(nvcc) >= (13, 0) else ARCHITECTURES_CUDA_12
    return [*known[:-1], known[-1] + "+PTX"]


def gencode(archs: list[str], source: str) -> list[str]:
    """-gencode flags for one source; a *_sm90.cu is built for sm_90a alone."""
    flags = []
    if source.endswith("_sm90.cu"):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    for arch in archs:
        number = re.sub(r"\D", "", arch.replace("+PTX", ""))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def jobs() -> int:
    """Compile jobs: MAX_JOBS, else one a processor and one per 2 GiB of free memory."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        count = min(count, max(1, free // 2**31))
    except (ValueError, OSError):
        pass
    return count


def compile_all(commands: list[tuple[Path, Path, list[str]]]) -> None:
    """Run each (source, object, command), several at once; objects that are up to date stay."""

    def stale(obj: Path, command: list[str]) -> bool:
        record, deps = obj.with_suffix(".cmd"), obj.with_suffix(".d")
        if not (obj.exists() and record.exists() and deps.exists()):
            return True
        if record.read_text() != shlex.join(command):
            return True
        made = obj.stat().st_mtime
        names = deps.read_text().replace("\\\n", " ").split(":", 1)[-1].split()
        return any(not Path(n).exists() or Path(n).stat().st_mtime > made for n in names)

    def run(task: tuple[Path, Path, list[str]]) -> str | None:
        source, obj, command = task
        if not stale(obj, command):
            return None
        obj.parent.mkdir(parents=True, exist_ok=True)
        print("compiling", source.relative_to(ROOT), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        if done.stderr.strip():
            print(done.stderr, flush=True)
        obj.with_suffix(".cmd").write_text(shlex.join(command))
        return None

    with ThreadPoolExecutor(jobs()) as pool:
        failures = [f for f in pool.map(run, commands) if f]
    if failures:
        raise BuildError("ft_handler: compiling failed\n" + "\n".join(failures))


def build_library(out: Path) -> None:
    """Compile csrc/ and link `out`."""
    torch = find_torch()
    nvcc = nvcc_path()
    cxx = os.environ.get("CXX", "c++")
    if not shutil.which(cxx.split()[0]):
        raise BuildError(f"ft_handler: no C++ compiler ({cxx}); install g++ or set CXX")
    objects = ROOT / "build" / "objects"
    # -MMD makes the list of headers that `compile_all` compares against.
    common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-MMD", f"-I{ROOT / 'csrc'}"]
    common += ["-Wall", "-Wextra"]
    torch_flags = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DTORCH_STABLE_ONLY",
        "-isystem", str(torch / "include"),
        "-isystem", str(torch / "include/torch/csrc/api/include"),
    ]  # fmt: skip
    version = (ROOT / "ft_handler/version.py").read_text().split('__version__ = "')[1].split('"')[0]
    torch_version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    torch_flags += [
        f'-DFT_HANDLER_VERSION="{version}"',
        f'-DFT_TORCH_BUILD_VERSION="{torch_version[1] if torch_version else "unknown"}"',
    ]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    tasks: list[tuple[Path, Path, list[str]]] = []

    def add_cpp(source: Path, extra: list[str]) -> None:
        obj = objects / source.relative_to(ROOT).with_suffix(".cpp.o")
        flags = next((f for end, f in X86_FLAGS.items() if source.stem.endswith(end)), [])
        if flags and not x86:
            return
        tasks.append(
            (
                source,
                obj,
                [*shlex.split(cxx), *common, *flags, *extra, "-c", str(source), "-o", str(obj)],
            )
        )

    for source in sorted((ROOT / "csrc/kernels/cpu").rglob("*.cpp")):
        add_cpp(source, [])
    archs: list[str] = []
    cuda_flags: list[str] = []
    link: list[str] = []
    if nvcc is not None:
        archs = architectures(nvcc)
        root = cuda_root(nvcc)
        folders = [root / "include", *wheel_includes()]
        cublas = find_header("cublasLt.h", folders)
        if cublas is None:
            raise BuildError(
                "ft_handler: the CUDA build needs cublasLt.h; pip install nvidia-cublas, "
                "or set FT_HANDLER_CUDA=0"
            )
        # Toolkit first, so that a wheel of another minor version cannot mix its headers in.
        includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(root / "include")]
        if cublas != root / "include":
            includes += ["-isystem", str(cublas)]
        sm90 = any(a.startswith("9.0") for a in archs)
        cuda_flags = [
            "-DFT_WITH_CUDA",
            "-DUSE_CUDA",
            f'-DFT_CUDA_ARCHS="{";".join(archs)}"',
            *includes,
        ]
        if sm90:
            cuda_flags.append("-DFT_WITH_SM90")
        for source in sorted((ROOT / "csrc/kernels/cuda").rglob("*.cu")):
            if source.name.endswith("_sm90.cu") and not sm90:
                continue
            obj = objects / source.relative_to(ROOT).with_suffix(".cu.o")
            command = [
                str(nvcc), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads", "2",
                "-MMD", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Werror", "all-warnings",
                *(["-DFT_WITH_SM90"] if sm90 else []),
                *includes, *gencode(archs, source.name), "-c", str(source), "-o", str(obj),
            ]  # fmt: skip
            tasks.append((source, obj, command))
        for source in sorted((ROOT / "csrc/kernels/cuda").rglob("*.cpp")):
            add_cpp(source, cuda_flags)
        link = [
            f"-L{d}"
            for d in (root / "lib64", root / "lib", root / "targets/x86_64-linux/lib")
            if d.exists()
        ]
        link += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    for source in sorted((ROOT / "csrc/torch").rglob("*.cpp")):
        if "cuda" in source.stem and nvcc is None:
            continue
        add_cpp(source, [*torch_flags, *cuda_flags])
    print(
        f"ft_handler: torch headers of {torch}; "
        + (
            f"CUDA {'.'.join(map(str, nvcc_version(nvcc)))} for {';'.join(archs)}"
            if nvcc
            else "CPU only"
        ),
        flush=True,
    )
    compile_all(tasks)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Linked beside its place and moved, so that a process never maps half a file.
    fresh = out.with_suffix(".so.tmp")
    command = [
        *shlex.split(cxx), "-shared", "-o", str(fresh), *[str(o) for _, o, _ in tasks],
        f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", *link, "-ldl",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"ft_handler: linking failed\n{shlex.join(command)}\n{done.stderr}")
    os.replace(fresh, out)
    print("built", out, flush=True)


class BuildPyWithLibrary(build_py):
    """Builds the library before the Python files are gathered."""

    def run(self) -> None:
        build_library(ROOT / "ft_handler" / "lib" / LIBRARY)
        super().run()


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: py3-none-<platform>."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Carries a shared library although it has no extension module."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    if sys.argv[1:] == ["library"]:  # `python setup.py library`: build in place, for work on csrc/
        build_library(ROOT / "ft_handler" / "lib" / LIBRARY)
    else:
        setup(
            cmdclass={"build_py": BuildPyWithLibrary, "bdist_wheel": PlatformWheel},
            distclass=BinaryDistribution,
            setup_requires=cuda_build_requirements(),
        )
