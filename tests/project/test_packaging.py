"""What setup.py finds, asks for and says; nothing is compiled."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools", minversion="77", reason="setup.py needs setuptools 77")
ROOT = Path(__file__).resolve().parents[2]
# Every variable that setup.py reads.
VARIABLES = ("FT_HANDLER_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "MAX_JOBS", "CXX", "CXXFLAGS")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with none of its variables set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("ft_handler_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(folder: Path, name: str, says: str, status: int = 0) -> Path:
    """An executable that prints a line and ends."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    path.chmod(0o755)
    return path


def torch_in(site: Path, version: str) -> Path:
    """A folder that looks like an installed torch."""
    header = site / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (site / "torch/version.py").write_text(f"debug = False\n__version__ = '{version}'\n")
    return site / "torch"


@pytest.fixture
def no_programs(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all of PATH and beside the interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(build.sys, "executable", str(folder / "python"))
    return folder


def test_a_build_without_sources_says_so(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "csrc/torch").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no C\+\+ sources in .*csrc/torch.*incomplete"):
        build.build_library(tmp_path / "library.so")
    (tmp_path / "csrc/torch/schema.cpp").touch()
    with pytest.raises(SystemExit, match=r"no C\+\+ sources in .*csrc/kernels/cpu"):
        build.build_library(tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()


def test_a_build_without_torch_says_where_it_looked(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "site_packages", lambda: [tmp_path])
    with pytest.raises(SystemExit, match=r"needs torch 2\.10 or later") as refused:
        build.find_torch()
    assert str(tmp_path / "torch") in str(refused.value)
    assert "--no-build-isolation" in str(refused.value)


def test_a_torch_that_is_too_old_is_named_and_passed_over(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [tmp_path / "old", tmp_path / "new"]
    monkeypatch.setattr(build, "site_packages", lambda: sites)
    torch_in(sites[0], "2.9.1+cpu")
    with pytest.raises(SystemExit, match=r"torch 2\.9\.1\+cpu in .* is too old; 2\.10"):
        build.find_torch()
    newer = torch_in(sites[1], "2.10.0")
    assert build.find_torch() == newer
    assert build.torch_version(newer) == "2.10.0"


def test_an_isolated_build_sees_the_environment_on_path(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m build` and uv leave nothing else of the environment that called them."""
    site = tmp_path / "venv/lib/python3.12/site-packages"
    torch = torch_in(site, "2.13.0")
    monkeypatch.setattr(build.sys, "path", [])
    own = {"purelib": str(tmp_path), "platlib": str(tmp_path)}
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: own)
    monkeypatch.setenv("PATH", f"{tmp_path / 'nowhere/bin'}:{tmp_path / 'venv/bin'}")
    assert build.find_torch() == torch


def test_cuda_that_is_demanded_needs_nvcc(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() is None
    monkeypatch.setenv("FT_HANDLER_CUDA", "1")
    with pytest.raises(SystemExit, match="FT_HANDLER_CUDA=1, but there is no nvcc"):
        build.find_nvcc()
    nvcc = program(tmp_path / "bin", "nvcc", "release 13.0, V13.0.88")
    assert build.find_nvcc() == nvcc
    monkeypatch.setenv("FT_HANDLER_CUDA", "0")
    assert build.find_nvcc() is None
    monkeypatch.setenv("FT_HANDLER_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, not 'yes'"):
        build.find_nvcc()


@pytest.mark.parametrize(("cuda", "newest"), [("13.0", "12.0+PTX"), ("12.8", "9.0+PTX")])
def test_architectures(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str, newest: str
) -> None:
    nvcc = program(tmp_path, "nvcc", f"Cuda compilation tools, release {cuda}, V{cuda}.88")
    found = build.architectures(nvcc)
    assert "8.0" in found
    assert found[-1] == newest
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " 8.0 9.0+PTX,12.0;")
    assert build.architectures(nvcc) == ["8.0", "9.0+PTX", "12.0"]


def test_what_the_build_lacks_is_asked_for(
    build: ModuleType, no_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_HANDLER_CUDA", "0")
    assert build.build_requirements() == ["cmake>=3.25", "ninja"]
    program(no_programs, "make", "GNU Make 4.3")
    program(no_programs, "cmake", "cmake version 3.22.1")
    assert build.build_requirements() == ["cmake>=3.25"]
    program(no_programs, "cmake", "cmake version 4.1.0")
    assert build.build_requirements() == []
    program(no_programs, "cmake", "cmake version 4.1.0", status=1)
    assert build.build_requirements() == ["cmake>=3.25"]
    (no_programs / "cmake").write_text("#!/a/venv/that/was/removed/bin/python\n")
    assert build.build_requirements() == ["cmake>=3.25"]


def test_cublas_headers_are_asked_for_by_the_toolkits_version(
    build: ModuleType, tmp_path: Path, no_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "tool", lambda *_: "there")
    monkeypatch.setattr(build, "site_packages", lambda: [tmp_path / "site"])
    monkeypatch.setattr(build.sys, "path", [])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    program(tmp_path / "cuda/bin", "nvcc", "release 12.6, V12.6.1")
    assert build.build_requirements() == ["nvidia-cublas-cu12>=12,<13"]
    program(tmp_path / "cuda/bin", "nvcc", "release 13.0, V13.0.88")
    assert build.build_requirements() == ["nvidia-cublas>=13,<14"]
    header = tmp_path / "site/nvidia/cu13/include/cublasLt.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert build.build_requirements() == []


@pytest.fixture
def fake_torch(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch of 2.13 and no CUDA."""
    monkeypatch.setattr(build, "site_packages", lambda: [tmp_path])
    monkeypatch.setenv("FT_HANDLER_CUDA", "0")
    return torch_in(tmp_path, "2.13.0")


def test_missing_programs_are_named(
    build: ModuleType,
    fake_torch: Path,
    no_programs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    out = tmp_path / "library.so"
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(c\+\+\); install g\+\+ or set CXX"):
        build.build_library(out)
    program(no_programs, "g++", "g++ 12")
    with pytest.raises(SystemExit, match=r"needs cmake 3\.25 or later; pip install cmake"):
        build.build_library(out)
    program(no_programs, "cmake", "cmake version 3.25.1")
    with pytest.raises(SystemExit, match="needs ninja or make; pip install ninja"):
        build.build_library(out)
    monkeypatch.setenv("CXX", "my-compiler -m64")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(my-compiler -m64\)"):
        build.build_library(out)
    assert not out.exists()


def test_another_compiler_starts_afresh_and_nothing_else_does(
    build: ModuleType, fake_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "--build" in command:
            (tmp_path / "build/cpu/libpyt_fastertransformer.so").write_text("built")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(build, "tool", lambda name, *_: f"/usr/bin/{name}")
    monkeypatch.setattr(build.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(build.subprocess, "run", run)
    monkeypatch.setenv("MAX_JOBS", "3")
    out = tmp_path / "lib/library.so"
    kept = tmp_path / "build/cpu/an.o"
    build.build_library(out)
    assert out.read_text() == "built"
    kept.touch()
    build.build_library(out)
    assert kept.exists()
    monkeypatch.setenv("CXX", "another")
    build.build_library(out)
    assert not kept.exists()
    assert len(commands) == 6
    assert {c[-1] for c in commands if "--build" in c} == {"-j3"}


def test_a_failed_step_leaves_the_old_library(
    build: ModuleType, fake_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(build, "tool", lambda name, *_: "/bin/false")
    monkeypatch.setattr(build.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    out = tmp_path / "library.so"
    out.write_text("old")
    with pytest.raises(SystemExit, match="configuring failed, see above; the command was"):
        build.build_library(out)
    assert out.read_text() == "old"


def test_modules_of_an_earlier_build_are_not_packed(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_library", lambda _: None)
    command = build.BuildPyWithLibrary(build.Distribution({"py_modules": []}))
    command.finalize_options()
    command.build_lib = str(tmp_path)
    removed = tmp_path / "ft_handler/removed.py"
    removed.parent.mkdir()
    removed.touch()
    command.run()
    assert not removed.exists()


@pytest.fixture
def flags(build: ModuleType, fake_torch: Path, tmp_path: Path) -> dict[str, list[str]]:
    """The compile flags of every source, by its name, after configuring for CPUs."""
    cmake = build.tool("cmake", build.LEAST_CMAKE)
    maker = build.tool("ninja") or build.tool("make")
    if not cmake or not maker or not shutil.which("c++"):
        pytest.skip("needs cmake, ninja or make, and a C++ compiler")
    generator = "Ninja" if Path(maker).name == "ninja" else "Unix Makefiles"
    variables = {**build.cmake_variables(), "CMAKE_MAKE_PROGRAM": maker}
    subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", "-G", generator]
        + [f"-D{name}={value}" for name, value in variables.items()],
        check=True, capture_output=True,
    )  # fmt: skip
    listed = json.loads((tmp_path / "build/compile_commands.json").read_text())
    return {
        str(Path(entry["file"]).relative_to(ROOT / "csrc")): shlex.split(entry["command"])
        for entry in listed
    }


def test_every_cpu_source_has_its_flags(flags: dict[str, list[str]], fake_torch: Path) -> None:
    sources = {str(p.relative_to(ROOT / "csrc")) for p in (ROOT / "csrc").rglob("*.cpp")}
    kernels = {name for name in sources if name.startswith(("kernels/cpu/", "kernels/host/"))}
    bindings = {name for name in sources if name.startswith("torch/") and "cuda" not in name}
    chosen = {name for name in kernels if re.search(r"_(avx2|avx512|amx)\w*\.cpp$", name)}
    assert chosen
    if platform.machine() != "x86_64":
        kernels, chosen = kernels - chosen, set()
    assert set(flags) == kernels | bindings
    everywhere = {"-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"}
    for name, command in flags.items():
        assert everywhere <= {*command}
        assert "-DNDEBUG" not in command
        assert ("-DTORCH_STABLE_ONLY" in command) == (name in bindings)
        assert ("-DTORCH_TARGET_VERSION=0x020a000000000000" in command) == (name in bindings)
        assert ('-DFT_TORCH_BUILD_VERSION="2.13.0"' in command) == (name in bindings)
        assert (str(fake_torch / "include") in command) == (name in bindings)
        instructions = {flag.removeprefix("-m") for flag in command if flag.startswith("-m")}
        avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}
        expected = {
            "avx2": {"avx2", "fma", "f16c"},
            "avx512": avx512,
            "avx2vnni": {"avx2", "fma", "f16c", "avxvnni"},
            "avx512vnni": {*avx512, "avx512vnni"},
            "avx512bf16": {*avx512, "avx512vnni", "avx512bf16"},
            "amx": {*avx512, "avx512vnni", "avx512bf16", "amx-tile", "amx-bf16", "amx-int8"},
        }
        suffix = Path(name).stem.rpartition("_")[2]
        assert instructions == (expected[suffix] if name in chosen else set())
