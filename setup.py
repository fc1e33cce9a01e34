"""Packs ft_handler with the library that CMakeLists.txt builds; metadata lives in pyproject.toml.

    python setup.py library    builds ft_handler/lib/libpyt_fastertransformer.so in place

The library is plain C++ on torch's stable ABI (2.10 and later): it links torch, not Python, so
one `py3-none-<platform>` wheel serves every Python and every torch from 2.10 on. The build needs
torch's headers only and takes them from the torch that is installed beside the interpreter, also
from inside an isolated build environment.

Environment:
  FT_HANDLER_CUDA=0|1    leave the CUDA backend out, or demand it (default: when nvcc is found)
  TORCH_CUDA_ARCH_LIST   such as "8.0;9.0" (default: every architecture the toolkit knows from 7.5)
  CUDA_HOME              where the toolkit is (default: beside nvcc)
  MAX_JOBS               compile jobs (default: processors, bounded by free memory)
  CXX, CXXFLAGS          the compiler, and flags beside ours
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

try:
    from setuptools import Distribution, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py
except ImportError:
    sys.exit("ft_handler: setup.py needs setuptools 77 or later; pip install -U setuptools")

ROOT = Path(__file__).resolve().parent
LIBRARY = "libpyt_fastertransformer.so"
BUILD = ROOT / "build" / "cmake"  # a folder in it with CUDA and one without
LEAST_TORCH = (2, 10)
LEAST_CMAKE = (3, 25)
ARCHITECTURES_CUDA_13 = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
ARCHITECTURES_CUDA_12 = ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0"]


class BuildError(SystemExit):
    """One clear line, no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"ft_handler: {message}")


def release(text: str) -> tuple[int, int]:
    """The first `major.minor` of a text."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def tool(name: str, least: tuple[int, int] = (0, 0)) -> str | None:
    """A program that runs and is new enough: the first on PATH, else beside the interpreter."""
    # Beside it, for a virtual environment that is not activated. It must run: the cmake of a wheel
    # is a Python script, which inside an isolated build does not find its own package.
    for folder in [*os.get_exec_path(), str(Path(sys.executable).parent)]:
        found = shutil.which(name, path=folder)
        if found is None:
            continue
        try:
            said = subprocess.run([found, "--version"], capture_output=True, text=True)
        except OSError:
            continue
        if said.returncode == 0 and release(said.stdout) >= least:
            return found
    return None


def site_packages() -> list[Path]:
    """Where the packages are: this interpreter's, then those of the environments on PATH."""
    # pip's isolated environment hides site-packages from sys.path but keeps sys.prefix; those of
    # `python -m build` and uv keep no more than the calling environment's place on PATH.
    found = [Path(p) for p in sys.path if p.endswith("-packages")]
    found += [Path(sysconfig.get_paths()[k]) for k in ("purelib", "platlib")]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if folder.endswith("bin"):
            found += sorted(Path(folder).parent.glob("lib/python3*/*-packages"))
    return list(dict.fromkeys(found))


def torch_version(torch: Path) -> str:
    """Such as `2.13.0+cpu`, read from a torch's folder without importing it."""
    match = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    return match[1] if match else "unknown"


def find_torch() -> Path:
    """The folder of the first installed torch that is new enough for the stable ABI."""
    places = [site / "torch" for site in site_packages()]
    found = [place for place in places if (place / "version.py").is_file()]
    for torch in found:
        if release(torch_version(torch)) >= LEAST_TORCH:
            return torch
    if found:
        raise BuildError(
            f"torch {torch_version(found[0])} in {found[0]} is too old; 2.10 is the least"
        )
    raise BuildError(
        "building needs torch 2.10 or later installed first (pip install torch); looked in "
        + ", ".join(map(str, places))
        + ". A build front end that makes its own environment (python -m build, uv) finds the "
        "torch of an activated environment; otherwise give it --no-isolation or "
        "--no-build-isolation."
    )


def find_nvcc() -> Path | None:
    """nvcc, or None where there is none or FT_HANDLER_CUDA=0."""
    wanted = os.environ.get("FT_HANDLER_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"FT_HANDLER_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    if home:
        found = Path(home) / "bin/nvcc"
    else:
        found = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if found.exists():
        return found
    if wanted == "1":
        raise BuildError(
            "FT_HANDLER_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME; install the CUDA "
            "toolkit, or unset it to build for CPUs alone"
        )
    return None


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """Such as (13, 0)."""
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return release(out.partition("release ")[2])


def cuda_include(nvcc: Path) -> Path:
    """The toolkit's headers: where nvcc itself says, since a wrapper may stand on PATH."""
    out = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"#\$ TOP=(.*)", out)
    root = Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent
    return root / "include"


def find_cublas(nvcc: Path) -> Path | None:
    """The folder that holds cublasLt.h: the toolkit's, else that of an NVIDIA wheel."""
    sites = [*site_packages(), *map(Path, sys.path)]
    wheels = [folder for site in sites for folder in sorted(site.glob("nvidia/*/include"))]
    return next((f for f in [cuda_include(nvcc), *wheels] if (f / "cublasLt.h").exists()), None)


def architectures(nvcc: Path) -> list[str]:
    """Such as ["8.0", "9.0"]; a "+PTX" suffix of TORCH_CUDA_ARCH_LIST is kept."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if any(listed):
        return [arch for arch in listed if arch]
    known = ARCHITECTURES_CUDA_13 if nvcc_version(nvcc) >= (13, 0) else ARCHITECTURES_CUDA_12
    return [*known[:-1], known[-1] + "+PTX"]


def jobs() -> int:
    """Compile jobs: MAX_JOBS, else one a processor and one per 2 GiB of free memory."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(len(os.sched_getaffinity(0)), max(1, free // 2**31))


def build_requirements() -> list[str]:
    """What this build still lacks and a package can bring: cmake, ninja, cuBLAS's headers."""
    wanted = []
    if not tool("cmake", LEAST_CMAKE):
        wanted.append("cmake>=3.25")
    if not (tool("ninja") or tool("make")):
        wanted.append("ninja")
    nvcc = find_nvcc()
    if nvcc is not None and find_cublas(nvcc) is None:
        newer = nvcc_version(nvcc) >= (13, 0)
        wanted.append("nvidia-cublas>=13,<14" if newer else "nvidia-cublas-cu12>=12,<13")
    return wanted


def cmake_variables() -> dict[str, str]:
    """CMakeLists.txt's variables, or BuildError where something is missing."""
    for folder in ("csrc/torch", "csrc/kernels/cpu"):
        if not any((ROOT / folder).rglob("*.cpp")):
            raise BuildError(
                f"no C++ sources in {ROOT / folder}: this copy of the source is incomplete; take "
                "a source distribution or a clone of the repository"
            )
    torch = find_torch()
    compiler = os.environ.get("CXX")
    names = shlex.split(compiler)[:1] if compiler else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise BuildError(f"no C++ compiler ({compiler or 'c++'}); install g++ or set CXX")
    version = re.search(r'__version__ = "(.+)"', (ROOT / "ft_handler/version.py").read_text())
    assert version is not None
    variables = {
        "FT_VERSION": version[1],
        "FT_TORCH": str(torch),
        "FT_TORCH_VERSION": torch_version(torch),
        "FT_CUDA_ARCHS": "",
    }
    nvcc = find_nvcc()
    built_for = "CPU only"
    if nvcc is not None:
        cublas = find_cublas(nvcc)
        if cublas is None:
            raise BuildError(
                "the CUDA build needs cublasLt.h; pip install nvidia-cublas, or set "
                "FT_HANDLER_CUDA=0"
            )
        variables |= {
            "FT_CUDA_ARCHS": ";".join(architectures(nvcc)),
            "FT_CUBLAS_INCLUDE": str(cublas),
            "CMAKE_CUDA_COMPILER": str(nvcc),
        }
        built_for = f"CUDA {'.'.join(map(str, nvcc_version(nvcc)))}, {variables['FT_CUDA_ARCHS']}"
    print(f"ft_handler: torch headers of {torch}; {built_for}", flush=True)
    return variables


def build_library(out: Path) -> None:
    """Configure, compile what is not up to date and put the library to `out`."""
    variables = cmake_variables()
    cmake = tool("cmake", LEAST_CMAKE)
    if cmake is None:
        raise BuildError("building needs cmake 3.25 or later; pip install cmake")
    maker = tool("ninja") or tool("make")
    if maker is None:
        raise BuildError("building needs ninja or make; pip install ninja")
    variables["CMAKE_MAKE_PROGRAM"] = maker
    generator = "Ninja" if Path(maker).name == "ninja" else "Unix Makefiles"
    folder = BUILD / ("cuda" if variables["FT_CUDA_ARCHS"] else "cpu")
    # CMake keeps the first compiler, generator and place that it saw; another one starts afresh.
    # The places of cmake and ninja do not count: an isolated build brings new ones each time.
    kept = [str(ROOT), generator, variables.get("CMAKE_CUDA_COMPILER", "")]
    kept += [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CUDAHOSTCXX", "LDFLAGS")]
    record = folder / "configured-for.txt"
    if not record.exists() or record.read_text() != "\n".join(kept):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record.write_text("\n".join(kept))
    arguments = [f"-D{name}={value}" for name, value in variables.items()]
    for step, command in {
        "configuring": [cmake, "-S", str(ROOT), "-B", str(folder), "-G", generator, *arguments],
        "compiling": [cmake, "--build", str(folder), f"-j{jobs()}"],
    }.items():
        if subprocess.run(command).returncode:
            raise BuildError(f"{step} failed, see above; the command was {shlex.join(command)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Copied beside its place and moved, so that a process never maps half a file.
    fresh = out.with_suffix(".so.tmp")
    shutil.copy2(folder / LIBRARY, fresh)
    os.replace(fresh, out)
    print("built", out, flush=True)


class BuildPyWithLibrary(build_py):
    """Builds the library before the Python files are gathered."""

    def run(self) -> None:
        # setuptools would pack modules that an earlier build left there.
        shutil.rmtree(Path(self.build_lib) / "ft_handler", ignore_errors=True)
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
    if sys.argv[1:] == ["library"]:
        build_library(ROOT / "ft_handler" / "lib" / LIBRARY)
    else:
        setup(
            cmdclass={"build_py": BuildPyWithLibrary, "bdist_wheel": PlatformWheel},
            distclass=BinaryDistribution,
            setup_requires=build_requirements(),
        )
