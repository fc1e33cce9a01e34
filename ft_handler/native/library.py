"""Finds and loads libpyt_fastertransformer.so, once a process."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_handler.config import environment
from ft_handler.errors import LibraryError
from ft_handler.version import __version__

if TYPE_CHECKING:
    import torch

LIBRARY = "libpyt_fastertransformer.so"
LIBRARY_VARIABLE = "FT_HANDLER_LIBRARY"
LEAST_TORCH = (2, 10)
NAMESPACE = "fastertransformer"

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

    $FT_HANDLER_LIBRARY or an explicit file is wanted alone; an explicit folder (an extracted
    archive) comes before the package's own `lib/`.
    """
    packaged = Path(__file__).resolve().parents[1] / "lib" / LIBRARY
    named = environment(LIBRARY_VARIABLE)
    if named:
        path = Path(named).expanduser()
        return [path / LIBRARY if path.is_dir() else path]
    if explicit is None:
        return [packaged]
    path = Path(explicit).expanduser()
    return [path / LIBRARY, packaged] if path.is_dir() else [path]


MEND = (
    "reinstall with `pip install .` (needs a C++ compiler), build in place with "
    f"`python setup.py library`, or set {LIBRARY_VARIABLE} to the file"
)


def load_library(path: str | os.PathLike[str] | None = None) -> Path:
    """Register the ops from `path` (a file or its folder) or the usual places; return the file.

    The first call of a process decides; later calls return its answer. Raises LibraryError when
    torch is older than 2.10, when no file is found (every path tried is listed), or when the file
    does not fit this torch or this package.
    """
    global _loaded
    with _lock:
        if _loaded is not None:
            return _loaded
        import torch

        if torch_release(torch.__version__) < LEAST_TORCH:
            raise LibraryError(
                f"torch {torch.__version__} is too old: {LIBRARY} needs torch "
                f"{LEAST_TORCH[0]}.{LEAST_TORCH[1]} or later; pip install -U torch"
            )
        tried = candidates(path)
        found = next((p for p in tried if p.is_file()), None)
        if found is None:
            listed = ", ".join(str(p) for p in tried)
            raise LibraryError(f"{LIBRARY} not found; tried {listed}; {MEND}")
        try:
            torch.ops.load_library(str(found))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            raise LibraryError(f"{found} does not load: {error}; {MEND}") from error
        check_build(json.loads(getattr(torch.ops, NAMESPACE).build_info()), found)
        _loaded = found
        return found


def check_build(build: dict[str, Any], path: Path) -> None:
    """Refuse a library of another release of this package, or built on a newer torch major."""
    import torch

    if build.get("version") != __version__:
        raise LibraryError(
            f"{path} is of ft_handler {build.get('version')}, the package is {__version__}; "
            "rebuild the library or install the matching package"
        )
    built_on = build.get("torch_build", "unknown")
    if built_on != "unknown" and torch_release(built_on)[0] != torch_release(torch.__version__)[0]:
        raise LibraryError(
            f"{path} was built on torch {built_on} and this is torch {torch.__version__}; "
            "rebuild the library here"
        )


def loaded_library() -> Path | None:
    """The file that was loaded, or None."""
    return _loaded


def build_info() -> dict[str, Any]:
    """What the loaded library says of its build: versions, instruction sets, CUDA architectures."""
    load_library()
    import torch

    info: dict[str, Any] = json.loads(getattr(torch.ops, NAMESPACE).build_info())
    return info


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
        raise LibraryError(
            f"{_loaded} was built without CUDA; rebuild it where nvcc is (FT_HANDLER_CUDA=1)"
        )
    capability = torch.cuda.get_device_capability(device)
    if not serves_capability(archs, capability):
        raise LibraryError(
            f"{_loaded} has code for compute capability {', '.join(archs)}, and {device} has "
            f"{capability[0]}.{capability[1]}; rebuild it with TORCH_CUDA_ARCH_LIST"
        )
