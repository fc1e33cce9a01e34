"""Finds and loads libpyt_fastertransformer.so, once a process."""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_handler.config import environment
from ft_handler.errors import LibraryError
from ft_handler.files import LIBRARY

if TYPE_CHECKING:
    import torch

LIBRARY_VARIABLE = "FT_HANDLER_LIBRARY"
LEAST_TORCH = (2, 10)
NAMESPACE = "fastertransformer"
# Interface 1 of the ops is `encoder` and its 24 arguments, 2 is `encode`, 3 are its activations
# beside gelu, its relative bias and `segment_pool`, 4 is `prepare_layers`, 5 are `prepare_narrow`,
# `serves_narrow` and the weights of `encode` for products in 8-bit floats.
CURRENT = 5

_MARKER = b"ft_handler library interface="
_MARKER_FIELDS = re.compile(rb"(\d+)-(\d+) cuda=([0-9a-zA-Z.;+]*) ")

_lock = threading.Lock()
_loaded: Path | None = None


def torch_release(version: str) -> tuple[int, int]:
    """`(2, 13)` of `2.13.0+cpu`."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise LibraryError(f"cannot read a release out of the torch version {version!r}")
    return int(match[1]), int(match[2])


def candidates(explicit: str | os.PathLike[str] | None = None) -> list[Path]:
    """Where the library may be, the strongest wish first.

    $FT_HANDLER_LIBRARY or an explicit file is wanted alone; the package's own `lib/` comes before
    an explicit folder (an extracted archive), so that an upgrade of the package is one.
    """
    packaged = Path(__file__).resolve().parents[1] / "lib" / LIBRARY
    named = environment(LIBRARY_VARIABLE)
    if named:
        path = Path(named).expanduser()
        return [path / LIBRARY if path.is_dir() else path]
    if explicit is None:
        return [packaged]
    path = Path(explicit).expanduser()
    return [packaged, path / LIBRARY] if path.is_dir() else [path]


@dataclass(frozen=True)
class Marker:
    """What a library file says of itself without being loaded.

    first, last  the interfaces of the ops that it has
    cuda_archs   compute capabilities such as "9.0+PTX", none without CUDA; None where it is silent
    """

    first: int
    last: int
    cuda_archs: tuple[str, ...] | None

    def fault(self, interface: int, cuda: bool) -> str:
        """Why it does not serve such a wish, or nothing."""
        if not self.first <= interface <= self.last:
            has = f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"
            return f"has interface {has} of the ops, interface {interface} is needed"
        if cuda and self.cuda_archs == ():
            return "was built without CUDA"
        return ""


UNMARKED = Marker(1, 1, None)


def read_marker(path: Path) -> Marker:
    """What a library file says of itself; `UNMARKED` where that is nothing.

    Raises LibraryError when the file cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            return UNMARKED
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            at = content.find(_MARKER)
            found = _MARKER_FIELDS.match(content, at + len(_MARKER)) if at >= 0 else None
            if found is None:
                return UNMARKED
            archs = found[3].decode()
            return Marker(int(found[1]), int(found[2]), tuple(archs.split(";") if archs else ()))
    except OSError as error:
        raise LibraryError(f"{path} cannot be read: {error}") from error


def _marker_of(build: dict[str, Any]) -> Marker:
    """What the loaded library's build_info says in place of its file."""
    first, last = build.get("interface", (UNMARKED.first, UNMARKED.last))
    return Marker(first, last, tuple(build.get("cuda_archs") or ()))


MEND = (
    "reinstall with `pip install .` (needs a C++ compiler), build in place with "
    f"`python setup.py library`, or set {LIBRARY_VARIABLE} to the file"
)
CUDA_MEND = "rebuild it where nvcc is (FT_HANDLER_CUDA=1)"


def find_library(
    path: str | os.PathLike[str] | None = None, *, interface: int = CURRENT, cuda: bool = False
) -> Path:
    """The first of `candidates(path)` that has this interface and, where asked for, CUDA code.

    Raises LibraryError that lists every place with the reason against it.
    """
    reasons = []
    lacks_cuda = False
    for candidate in candidates(path):
        if not candidate.is_file():
            reasons.append(f"{candidate} (not found)")
            continue
        try:
            fault = read_marker(candidate).fault(interface, cuda)
        except LibraryError as error:
            reasons.append(str(error))
            continue
        if not fault:
            return candidate
        lacks_cuda = lacks_cuda or "CUDA" in fault
        reasons.append(f"{candidate} {fault}")
    mend = f"{CUDA_MEND}, or {MEND}" if lacks_cuda else MEND
    raise LibraryError(f"no {LIBRARY} fits: {'; '.join(reasons)}; {mend}")


def load_library(
    path: str | os.PathLike[str] | None = None, *, interface: int = CURRENT, cuda: bool = False
) -> Path:
    """Register the ops from `path` (a file or its folder) or the usual places; return the file.

    interface  of the ops, that a model file needs
    cuda       whether the library must have code for CUDA

    A process loads one library, the first call's; a later call that needs what it lacks raises
    LibraryError. So it is when torch is older than 2.10, when no file fits (every path tried is
    listed with the reason), or when the file does not load on this torch.
    """
    global _loaded
    with _lock:
        if _loaded is not None:
            if fault := _marker_of(_read_build_info()).fault(interface, cuda):
                raise LibraryError(
                    f"{_loaded} is loaded already and {fault}; a process loads one library: load "
                    "the more demanding model first, or set "
                    f"{LIBRARY_VARIABLE} to a library that serves both"
                )
            return _loaded
        import torch

        if torch_release(torch.__version__) < LEAST_TORCH:
            raise LibraryError(
                f"torch {torch.__version__} is too old: {LIBRARY} needs torch "
                f"{LEAST_TORCH[0]}.{LEAST_TORCH[1]} or later; pip install -U torch"
            )
        found = find_library(path, interface=interface, cuda=cuda)
        try:
            torch.ops.load_library(str(found))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            raise LibraryError(f"{found} does not load: {error}; {MEND}") from error
        check_build(_read_build_info(), found)
        _loaded = found
        return found


def check_build(build: dict[str, Any], path: Path) -> None:
    """Refuse a library that was built on another torch major."""
    import torch

    built_on = build.get("torch_build", "unknown")
    if built_on != "unknown" and torch_release(built_on)[0] != torch_release(torch.__version__)[0]:
        raise LibraryError(
            f"{path} was built on torch {built_on} and this is torch {torch.__version__}; "
            "rebuild the library here"
        )


def loaded_library() -> Path | None:
    """The file that was loaded, or None."""
    return _loaded


def _read_build_info() -> dict[str, Any]:
    import torch

    info: dict[str, Any] = json.loads(getattr(torch.ops, NAMESPACE).build_info())
    return info


def build_info() -> dict[str, Any]:
    """What the loaded library says of its build: interfaces, instruction sets, CUDA architectures.

    Loads the usual one where none is loaded yet.
    """
    if _loaded is None:
        load_library()
    return _read_build_info()


def serves_capability(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` (such as `["8.0", "9.0", "12.0+PTX"]`) runs on a GPU."""
    for arch in archs:
        major, minor = torch_release(arch.removesuffix("+PTX"))
        if major == capability[0] and minor <= capability[1]:
            return True
        if arch.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


def check_device(device: torch.device) -> None:
    """Refuse a CUDA device the loaded library has no code for; initialises CUDA."""
    import torch

    if not torch.cuda.is_available():
        raise LibraryError(f"{device} was asked for, but this torch sees no CUDA GPU")
    if _loaded is None:
        return
    archs = build_info().get("cuda_archs") or []
    if not archs:
        raise LibraryError(f"{_loaded} was built without CUDA; {CUDA_MEND}")
    capability = torch.cuda.get_device_capability(device)
    if not serves_capability(archs, capability):
        raise LibraryError(
            f"{_loaded} has code for compute capability {', '.join(archs)}, and {device} has "
            f"{capability[0]}.{capability[1]}; rebuild it with TORCH_CUDA_ARCH_LIST"
        )
